// SPDX-License-Identifier: Apache-2.0

// Package regular opens regular files in directories that others may write to.
// Opening anything else can have effects: a device may rewind a tape or arm a
// watchdog, a terminal may become the controlling one, and a FIFO releases its
// writer.
package regular

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// ErrNot is wrapped by the error about a file of another type.
var ErrNot = errors.New("not a regular file")

// attempts bounds how often a path is looked up again, which the kernel asks
// for when the tree is renamed or remounted meanwhile (EAGAIN, openat2(2)).
const attempts = 100

// Open opens a regular file for reading, and returns what is known of it. The
// path is relative to the directory dir, or absolute with [unix.AT_FDCWD]; its
// last element is never followed. Resolve has flags of openat2(2), RESOLVE_*.
//
// What was looked at is what is opened, however fast names are exchanged: the
// descriptor of the look, which has no effect on the file, is reopened.
func Open(dir int, path string, resolve uint64) (*os.File, unix.Stat_t, error) {
	var st unix.Stat_t
	at, err := Lookup(dir, path, unix.O_PATH, resolve)
	if err != nil {
		return nil, st, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(at)
	if err := unix.Fstat(at, &st); err != nil {
		return nil, st, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, st, fmt.Errorf("%q is %w", path, ErrNot)
	}
	fd, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", at), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, st, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), st, nil
}

// Lookup opens a path by openat2(2) with O_NOFOLLOW and O_CLOEXEC.
func Lookup(dir int, path string, flags, resolve uint64) (int, error) {
	how := &unix.OpenHow{Flags: flags | unix.O_NOFOLLOW | unix.O_CLOEXEC, Resolve: resolve}
	for range attempts {
		fd, err := unix.Openat2(dir, path, how)
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			return fd, err
		}
	}
	return -1, unix.EBUSY
}
