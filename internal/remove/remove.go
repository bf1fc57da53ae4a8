// SPDX-License-Identifier: Apache-2.0

// Package remove removes trees that somebody else has made. Unlike
// [os.RemoveAll] it needs few descriptors however deep they are, and leaves
// alone what is mounted in them.
package remove

import (
	"crypto/rand"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/regular"
)

const (
	// maxDepth bounds how many directories are open at a time. What is deeper is
	// moved up.
	maxDepth = 16
	// batch is the number of names that are read at a time.
	batch = 512
	// maxPasses bounds how often a directory is emptied, maxEntries how much is
	// removed in all: somebody may still be writing to it.
	maxPasses  = 10
	maxEntries = 1 << 22
)

var errBusy = errors.New("somebody is still writing to it")

// All removes path and whatever is below it. It succeeds if there is nothing.
func All(path string) error {
	path = filepath.Clean(path)
	parent, err := unix.Open(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err == nil {
		defer unix.Close(parent)
		w := &walk{top: -1}
		err = w.remove(parent, filepath.Base(path), 0)
	}
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return &fs.PathError{Op: "remove", Path: path, Err: err}
	}
	return nil
}

// walk is the removal of one tree.
type walk struct {
	// top is the tree's uppermost directory.
	top     int
	entries int
}

func (w *walk) remove(dir int, name string, depth int) error {
	err := unix.Unlinkat(dir, name, 0)
	if !errors.Is(err, unix.EISDIR) {
		return err
	}
	if depth == maxDepth {
		return unix.Renameat(dir, name, w.top, "."+rand.Text())
	}
	fd, err := regular.Lookup(dir, name, unix.O_RDONLY|unix.O_DIRECTORY, unix.RESOLVE_BENEATH|unix.RESOLVE_NO_SYMLINKS|unix.RESOLVE_NO_XDEV)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	if depth == 0 {
		w.top = fd
	}
	for range maxPasses {
		if err := w.empty(f, depth); err != nil {
			return err
		}
		// What is at the top may have come from below meanwhile.
		if err = unix.Unlinkat(dir, name, unix.AT_REMOVEDIR); !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, unix.EEXIST) {
			return err
		}
	}
	return errBusy
}

// empty removes what is in a directory until nothing is left.
func (w *walk) empty(f *os.File, depth int) error {
	for {
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return err
		}
		names, err := f.Readdirnames(batch)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if w.entries += len(names); w.entries > maxEntries {
			return errBusy
		}
		for _, name := range names {
			if err := w.remove(int(f.Fd()), name, depth+1); err != nil && !errors.Is(err, unix.ENOENT) {
				return err
			}
		}
	}
}
