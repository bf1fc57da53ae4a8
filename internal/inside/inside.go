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

	"github.com/kata-checkpoint/kata-checkpoint/internal/thread"
)

// ErrMayBlock is returned for a path below a mount that may never answer.
var ErrMayBlock = errors.New("it is on a file system that may not answer")

// Tree is the file tree of a mount namespace.
type Tree struct {
	root   int
	mounts []*mountinfo.Info
	// points are the mount points, and blocks those of mounts that may block.
	points, blocks map[string]bool
}

// Open opens the tree of a process's mount namespace, from the namespace's own
// root: the process may have another one. Answers reports whether a mount may
// be entered; nil: all may. The caller closes the tree.
func Open(pid int, answers func(*mountinfo.Info) bool) (*Tree, error) {
	t := &Tree{root: -1, points: make(map[string]bool), blocks: make(map[string]bool)}
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
		data, err := io.ReadAll(f)
		if err != nil {
			return err
		}
		if t.mounts, err = mountinfo.GetMountsFromReader(bytes.NewReader(data), nil); err != nil {
			return err
		}
		t.root, err = unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open the root of the container: %w", err)
	}
	for _, m := range t.mounts {
		t.points[m.Mountpoint] = true
		if answers != nil && !answers(m) {
			t.blocks[m.Mountpoint] = true
		}
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
	how := unix.OpenHow{Flags: flags | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS}
	if len(t.blocks) > 0 {
		if t.mayBlock(path) {
			return -1, &os.PathError{Op: "open", Path: path, Err: ErrMayBlock}
		}
		how.Resolve |= unix.RESOLVE_NO_SYMLINKS
	}
	fd, err := unix.Openat2(t.root, "."+path, &how)
	if err != nil {
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
