// SPDX-License-Identifier: Apache-2.0

package kata

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/pidfd"
	"github.com/kata-checkpoint/kata-checkpoint/internal/thread"
)

// ErrNotShared is wrapped by the error about a directory that nothing serves to
// the guest, as far as the shim can see.
var ErrNotShared = errors.New("it is not found among what is shared with the guest")

// ErrInUse is wrapped by the error about a directory that the guest has files
// open for writing in.
var ErrInUse = errors.New("the guest has files open for writing in it")

// SetWritable sets whether the guest of a sandbox can write to a directory of
// the host that Kata has mounted in its share, without a change on the host's
// side of it. In either case nothing there is a device, or runs, by way of these
// mounts.
//
// virtiofsd serves copies of the mounts of Kata's shim, in a mount namespace of
// its own or in that of the shim. Flags of a mount do not propagate, so that
// each copy is changed in place. pid and pidfd are those of Kata's shim, which
// has virtiofsd for a child.
func SetWritable(pidfd, pid int, sandbox, dir string, writable bool) error {
	return setWritable(pidfd, pid, filepath.Join(shareDir, filepath.Base(sandbox)), dir, writable)
}

func setWritable(fd, pid int, share, dir string, writable bool) error {
	fail := func(err error) error {
		return fmt.Errorf("change what the guest may write to in %s: %w", dir, err)
	}
	at, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return fail(err)
	}
	defer unix.Close(at)
	var id unix.Stat_t
	if err := unix.Fstat(at, &id); err != nil {
		return fail(err)
	}
	where, err := mountOf(dir)
	if err != nil {
		return fail(err)
	}
	own, err := mountNamespace(os.Getpid())
	if err != nil {
		return fail(err)
	}
	seen := map[string]bool{own: true} // what is mounted there is the host's
	found := false
	processes := append([]int{pid}, descendants(pid, maxGenerations)...)
	for i, p := range processes {
		ns, err := mountNamespace(p)
		if err != nil || seen[ns] {
			continue // it has exited
		}
		seen[ns] = true
		targets, err := mountsOf(p, where)
		if err != nil {
			continue
		}
		if i == 0 {
			targets = served(targets, share)
		}
		if len(targets) == 0 {
			continue
		}
		found = true
		pfd := fd
		if i > 0 {
			if pfd, err = pidfd.Open(p); err != nil {
				continue
			}
		}
		err = inNamespace(pfd, targets, func(target int) error { return change(target, id, writable) })
		if i > 0 {
			unix.Close(pfd)
		}
		if err != nil {
			return fail(err)
		}
	}
	if !found {
		return fail(ErrNotShared)
	}
	return nil
}

// place is a directory as mountinfo shows it: its file system and its path
// there.
type place struct {
	major, minor int
	root         string
}

// mountOf returns where a directory is. On btrfs, stat(2) names another device.
func mountOf(dir string) (place, error) {
	dir, err := filepath.EvalSymlinks(dir) // as mountinfo has it
	if err != nil {
		return place{}, err
	}
	mounts, err := mountinfo.GetMounts(mountinfo.ParentsFilter(dir))
	if err != nil {
		return place{}, err
	}
	var best *mountinfo.Info
	for _, m := range mounts { // the last one is on top
		if best == nil || len(m.Mountpoint) >= len(best.Mountpoint) {
			best = m
		}
	}
	if best == nil {
		return place{}, fmt.Errorf("%s is on no mount", dir)
	}
	rel, err := filepath.Rel(best.Mountpoint, dir)
	if err != nil {
		return place{}, err
	}
	return place{best.Major, best.Minor, filepath.Join(best.Root, rel)}, nil
}

// mountsOf returns where a process has a place mounted.
func mountsOf(pid int, p place) ([]string, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/mountinfo", pid))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	mounts, err := mountinfo.GetMountsFromReader(f, func(m *mountinfo.Info) (skip, stop bool) {
		return place{m.Major, m.Minor, m.Root} != p, false
	})
	var targets []string
	for _, m := range mounts {
		targets = append(targets, m.Mountpoint)
	}
	return targets, err
}

// served leaves out the mounts of Kata's shim that virtiofsd has copies of, see
// [Protect].
func served(targets []string, share string) []string {
	var out []string
	for _, t := range targets {
		rel, err := filepath.Rel(share, t)
		first, _, _ := strings.Cut(rel, "/")
		if err == nil && first != ".." && first != writableDirs[0] && first != writableDirs[1] {
			out = append(out, t)
		}
	}
	return out
}

func mountNamespace(pid int) (string, error) {
	return os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", pid))
}

// maxGenerations bounds the search: virtiofsd starts a child of its own.
const maxGenerations = 4

// descendants returns the processes that a process has started, and those that
// these have.
func descendants(pid, generations int) []int {
	if generations == 0 {
		return nil
	}
	var out []int
	threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid)) // the pattern is valid
	for _, t := range threads {
		data, err := os.ReadFile(t)
		if err != nil {
			continue // it has exited
		}
		for field := range strings.FieldsSeq(string(data)) {
			if child, err := strconv.Atoi(field); err == nil {
				out = append(append(out, child), descendants(child, generations-1)...)
			}
		}
	}
	return out
}

// inNamespace calls f for mounts in the mount namespace of a process.
func inNamespace(pidfd int, targets []string, f func(fd int) error) error {
	return thread.Do(func() (err error) {
		if err := unix.Setns(pidfd, unix.CLONE_NEWNS); err != nil {
			if errors.Is(err, unix.ESRCH) {
				return nil // it has exited
			}
			return os.NewSyscallError("setns", err)
		}
		for _, t := range targets {
			// The path may lead through directories that the guest can write to.
			fd, oerr := unix.Openat2(unix.AT_FDCWD, t, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS})
			if errors.Is(oerr, unix.ENOENT) {
				continue // it is no longer mounted
			}
			if oerr != nil {
				err = errclass.Join(err, fmt.Errorf("open %s: %w", t, oerr))
				continue
			}
			if ferr := f(fd); ferr != nil {
				err = errclass.Join(err, fmt.Errorf("%s: %w", t, ferr))
			}
			unix.Close(fd)
		}
		return err
	})
}

// change changes the flags of a mount, if it is one of the directory.
func change(fd int, id unix.Stat_t, writable bool) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Dev != id.Dev || st.Ino != id.Ino {
		return err
	}
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NOEXEC}
	flags := uintptr(unix.MS_REMOUNT | unix.MS_BIND | unix.MS_NODEV | unix.MS_NOSUID | unix.MS_NOEXEC)
	if writable {
		attr.Attr_clr = unix.MOUNT_ATTR_RDONLY
	} else {
		attr.Attr_set |= unix.MOUNT_ATTR_RDONLY
		flags |= unix.MS_RDONLY
	}
	err := setAttr(fd, &attr, flags)
	if errors.Is(err, unix.EBUSY) {
		return ErrInUse
	}
	return err
}

// setAttr changes the flags of one mount, without its file system's other
// mounts. Before Linux 5.12 it takes flags of mount(2).
func setAttr(fd int, attr *unix.MountAttr, flags uintptr) error {
	err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, attr)
	if errors.Is(err, unix.ENOSYS) {
		// There may be no /proc.
		if err = unix.Fchdir(fd); err == nil {
			err = unix.Mount("", ".", "", flags, "")
		}
	}
	if errors.Is(err, unix.EINVAL) {
		return nil // it is no longer a mount
	}
	return err
}
