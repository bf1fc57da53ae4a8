// SPDX-License-Identifier: Apache-2.0

package outcome

import (
	"fmt"
	"io/fs"
	"os"
	"slices"
	"syscall"

	"github.com/moby/sys/capability"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/thread"
)

// CRIU fills each tmpfs of a container with the files in its images, as root.

// deviceNode is a device.
type deviceNode struct {
	kind   uint16 // S_IFCHR or S_IFBLK
	number uint64
}

// walk calls visit with each file of a file system that is mounted in the mount
// namespace of a process, also of what is mounted over. A file system that is
// mounted over as a whole has no files.
func walk(pid int, m *mountinfo.Info, visit func(path string, st *syscall.Stat_t)) error {
	var clone int
	err := thread.Do(func() error {
		err := thread.Enter(pid, "mnt")
		if err == nil {
			clone, err = unix.OpenTree(unix.AT_FDCWD, m.Mountpoint, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_SYMLINK_NOFOLLOW)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("open the file system at %s: %w", m.Mountpoint, err)
	}
	defer unix.Close(clone)
	var st unix.Stat_t
	if err := unix.Fstat(clone, &st); err != nil {
		return err
	}
	if st.Dev != unix.Mkdev(uint32(m.Major), uint32(m.Minor)) || st.Mode&unix.S_IFMT != unix.S_IFDIR { //nolint:gosec // device numbers
		return nil
	}
	err = fs.WalkDir(os.DirFS(fmt.Sprintf("/proc/self/fd/%d", clone)), ".", func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err == nil {
			visit(path, info.Sys().(*syscall.Stat_t))
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("look at the files at %s: %w", m.Mountpoint, err)
	}
	return nil
}

// readDevices reads which devices a container has nodes of: those in the tmpfs
// that Kata makes for it.
func (c *comparison) readDevices(pid int) (map[deviceNode]bool, error) {
	out := make(map[deviceNode]bool)
	for _, m := range c.may.mounts {
		if !c.fresh(m) {
			continue
		}
		err := walk(pid, m, func(_ string, st *syscall.Stat_t) {
			if kind := uint16(st.Mode & unix.S_IFMT); kind == unix.S_IFCHR || kind == unix.S_IFBLK {
				out[deviceNode{kind, st.Rdev}] = true
			}
		})
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}

// contents checks what CRIU has put into the file systems that it has created: no
// device that the container has no node of, and no program that makes its caller
// another user.
func (k *check) contents(pid int, c *comparison) error {
	makeNodes, err := k.able(capability.CAP_MKNOD, capability.CAP_SYS_ADMIN)
	if err != nil {
		return err
	}
	become, err := k.able(capability.CAP_SETUID)
	if err != nil {
		return err
	}
	users, groups, err := k.ownIDs()
	if err != nil {
		return err
	}
	for _, m := range c.have.mounts {
		options := restrictions(m)
		devices := !makeNodes && !slices.Contains(options, "nodev")
		setID := !become && !k.rights.noNewPrivs && !slices.Contains(options, "nosuid")
		if !c.fresh(m) || !devices && !setID {
			continue
		}
		err := walk(pid, m, func(path string, st *syscall.Stat_t) {
			kind := uint16(st.Mode & unix.S_IFMT)
			switch {
			case kind == unix.S_IFCHR || kind == unix.S_IFBLK:
				if devices && !k.devices[deviceNode{kind, st.Rdev}] && !isTerminal(kind, st.Rdev) {
					k.find(pid, "has a node of the device %d:%d in %s, and the container has none", unix.Major(st.Rdev), unix.Minor(st.Rdev), m.Mountpoint)
				}
			case kind == unix.S_IFREG && setID:
				if st.Mode&unix.S_ISUID != 0 && !slices.Contains(users, st.Uid) || st.Mode&unix.S_ISGID != 0 && !slices.Contains(groups, st.Gid) {
					k.find(pid, "has a set-user-ID program, %q in %s, and the container has none", path, m.Mountpoint)
				}
			}
		})
		if err != nil {
			return err
		}
	}
	return nil
}
