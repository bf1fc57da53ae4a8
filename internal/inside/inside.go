// SPDX-License-Identifier: Apache-2.0

// Package inside resolves paths in the mount namespace of a container, in which
// the container's own processes have arranged everything: no path leaves its
// root, follows a link of /proc, or enters a file system that may never answer.
//
// It relies on openat2(2) as in Linux 6.18.
package inside

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/regular"
	"github.com/kata-checkpoint/kata-checkpoint/internal/thread"
)

// Kind is what answers for the files of a mount.
type Kind int

const (
	// Other is anything else: a process in the guest (FUSE), another machine (NFS),
	// or nobody knows.
	Other Kind = iota
	// Memory is the guest's kernel alone.
	Memory
	// Host is the host, which shares them with the guest.
	Host
	// Disk is a disk, or other mounts in layers: what answers for those is not
	// known from the mount.
	Disk
)

// kinds are by the types of file systems.
var kinds = map[string]Kind{
	"tmpfs": Memory, "devtmpfs": Memory, "ramfs": Memory, "hugetlbfs": Memory, "proc": Memory, "sysfs": Memory, "cgroup": Memory, "cgroup2": Memory,
	"devpts": Memory, "mqueue": Memory, "nsfs": Memory, "bpf": Memory, "configfs": Memory, "fusectl": Memory, "selinuxfs": Memory, "securityfs": Memory,
	"binfmt_misc": Memory, "pstore": Memory, "tracefs": Memory, "debugfs": Memory,
	"virtiofs": Host,
	"ext2":     Disk, "ext3": Disk, "ext4": Disk, "xfs": Disk, "btrfs": Disk, "f2fs": Disk, "erofs": Disk, "squashfs": Disk, "vfat": Disk, "iso9660": Disk,
	"overlay": Disk,
}

// KindOf returns the kind of a mount.
func KindOf(m *mountinfo.Info) Kind { return kinds[m.FSType] }

// ErrMayBlock is returned for a path below a mount that may never answer.
var ErrMayBlock = errors.New("it is on a file system that may not answer")

// Tree is a tree of files, as a process of a container sees it.
type Tree struct {
	root int
	// points are the mount points, and blocks those of mounts that may block.
	points, blocks map[string]bool
}

// Open opens the tree of a process's mount namespace, from the namespace's own
// root: the process may have another one. Answers reports whether a mount may
// be entered. The caller closes the tree.
func Open(pid int, answers func(*mountinfo.Info) bool) (*Tree, error) {
	var mounts []byte
	root := -1
	err := thread.Do(func() error {
		proc, err := unix.Open("/proc", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return &os.PathError{Op: "open", Path: "/proc", Err: err}
		}
		defer unix.Close(proc)
		if err := thread.Enter(pid, "mnt"); err != nil {
			return err
		}
		// The kernel lists the mounts below the root of the thread that opens it.
		fd, err := unix.Openat(proc, "thread-self/mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return &os.PathError{Op: "open", Path: "mountinfo", Err: err}
		}
		f := os.NewFile(uintptr(fd), "mountinfo")
		defer f.Close()
		if mounts, err = io.ReadAll(f); err != nil {
			return err
		}
		root, err = openRoot("/")
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open the root of the container: %w", err)
	}
	return newTree(root, mounts, answers)
}

// OpenRoot is Open from the root of the process. It is closed to all paths
// where that is not the root of a mount.
func OpenRoot(pid int, answers func(*mountinfo.Info) bool) (*Tree, error) {
	mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", pid))
	if err != nil {
		return nil, fmt.Errorf("read the mounts of the container: %w", err)
	}
	root, err := openRoot(fmt.Sprintf("/proc/%d/root", pid))
	if err != nil {
		return nil, fmt.Errorf("open the root of the container: %w", err)
	}
	return newTree(root, mounts, answers)
}

func openRoot(path string) (int, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return fd, nil
}

func newTree(root int, mounts []byte, answers func(*mountinfo.Info) bool) (*Tree, error) {
	list, err := mountinfo.GetMountsFromReader(bytes.NewReader(mounts), nil)
	if err != nil {
		unix.Close(root)
		return nil, fmt.Errorf("read the mounts of the container: %w", err)
	}
	t := &Tree{root: root, points: make(map[string]bool), blocks: make(map[string]bool)}
	for _, m := range list {
		t.points[m.Mountpoint] = true
		if !answers(m) {
			t.blocks[m.Mountpoint] = true
		}
	}
	if !t.points["/"] {
		t.blocks["/"] = true
	}
	return t, nil
}

// Close closes the tree.
func (t *Tree) Close() error { return unix.Close(t.root) }

// IsMountPoint reports whether something is mounted at a clean absolute path.
func (t *Tree) IsMountPoint(path string) bool { return t.points[path] }

// Open opens a clean absolute path with flags of open(2), and returns the
// descriptor. Symbolic links are followed within the tree, but not where a
// link may lead to a file system that may not answer.
func (t *Tree) Open(path string, flags uint64) (int, error) {
	if len(t.blocks) == 0 {
		return openIn(t.root, path, flags, 0)
	}
	if t.mayBlock(path) {
		return -1, &os.PathError{Op: "open", Path: path, Err: ErrMayBlock}
	}
	return openIn(t.root, path, flags, unix.RESOLVE_NO_SYMLINKS)
}

// OpenRegular opens a regular file for reading, however it may be replaced
// meanwhile: what was looked at is reopened.
func (t *Tree) OpenRegular(path string) (*os.File, error) {
	at, err := t.Open(path, unix.O_PATH)
	if err != nil {
		return nil, err
	}
	defer unix.Close(at)
	var st unix.Stat_t
	err = unix.Fstat(at, &st)
	if err == nil && st.Mode&unix.S_IFMT != unix.S_IFREG {
		err = regular.ErrNot
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	fd, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", at), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// openIn opens a path below a root that it does not leave.
func openIn(root int, path string, flags, resolve uint64) (int, error) {
	how := unix.OpenHow{Flags: flags | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS | resolve}
	// EAGAIN: something was renamed meanwhile, and the kernel cannot tell whether
	// the path has left the root.
	for range maxTries {
		fd, err := unix.Openat2(root, "."+path, &how)
		if err == nil {
			return fd, nil
		}
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			return -1, &os.PathError{Op: "open", Path: path, Err: err}
		}
	}
	return -1, &os.PathError{Op: "open", Path: path, Err: unix.EAGAIN}
}

const maxTries = 100

// OpenMount opens the directory that is mounted at a clean absolute path, and
// nothing else: no other directory of the device, and none that a symbolic link
// leads to.
func (t *Tree) OpenMount(path string, device uint64) (int, error) {
	if t.mayBlock(path) {
		return -1, &os.PathError{Op: "open", Path: path, Err: ErrMayBlock}
	}
	fd, err := OpenMountPoint(t.root, path, unix.O_DIRECTORY)
	if err != nil {
		return -1, err
	}
	var st unix.Stat_t
	err = unix.Fstat(fd, &st)
	if err == nil && uint64(st.Dev) != device { //nolint:unconvert // 32 bits on some architectures
		err = ErrNotMounted
	}
	if err != nil {
		unix.Close(fd)
		return -1, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return fd, nil
}

// ErrNotMounted is returned where something else is at a mount point.
var ErrNotMounted = errors.New("it is not what the container was created with")

// OpenMountPoint opens the root of a mount by its path below a root, without
// symbolic links, as a path (O_PATH).
func OpenMountPoint(root int, path string, flags uint64) (int, error) {
	fd, err := openIn(root, path, unix.O_PATH|unix.O_NOFOLLOW|flags, unix.RESOLVE_NO_SYMLINKS)
	if err != nil {
		return -1, err
	}
	var st unix.Statx_t
	err = unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, 0, &st)
	if err == nil && st.Attributes&unix.STATX_ATTR_MOUNT_ROOT == 0 {
		err = ErrNotMounted
	}
	if err != nil {
		unix.Close(fd)
		return -1, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return fd, nil
}

// mayBlock reports whether a path without symbolic links is on a mount that may
// block, or leads through one.
func (t *Tree) mayBlock(path string) bool {
	if t.blocks["/"] {
		return true
	}
	for i := range len(path) {
		if i > 0 && path[i] == '/' && t.blocks[path[:i]] {
			return true
		}
	}
	return t.blocks[strings.TrimSuffix(path, "/")]
}
