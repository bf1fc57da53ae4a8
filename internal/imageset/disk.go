// SPDX-License-Identifier: Apache-2.0

package imageset

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/regular"
)

// disk is what turns files into an image set that survives a power loss. Its
// order matters, so that a test records it and replays every part of it.
// Everything happens in directories that are open: a path could lead elsewhere
// by then.
type disk interface {
	// create makes a file with a content.
	create(dir *os.File, name string, content []byte) error
	// rename moves a file to a directory where none has its name.
	rename(from, to *os.File, name string) error
	// exchange swaps two entries of a directory.
	exchange(dir *os.File, a, b string) error
	// remove removes a file.
	remove(dir *os.File, name string) error
	// removeAll removes a directory with all that is in it.
	removeAll(dir *os.File, name string) error
	// sync waits until the content of a file is on the disk.
	sync(dir *os.File, name string) error
	// syncDir waits until the names in a directory are on the disk.
	syncDir(dir *os.File) error
}

// kernel is the disk.
type kernel struct{}

func (kernel) create(dir *os.File, name string, content []byte) error {
	f, err := create(dir, name)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	return errclass.Join(err, f.Close())
}

func (kernel) rename(from, to *os.File, name string) error {
	err := unix.Renameat2(int(from.Fd()), name, int(to.Fd()), name, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) { // not on this file system, such as NFS
		if there, e := exists(to, name); e != nil || there {
			return &os.PathError{Op: "rename", Path: to.Name() + "/" + name, Err: errclass.Join(e, unix.EEXIST)}
		}
		err = unix.Renameat(int(from.Fd()), name, int(to.Fd()), name)
	}
	if err != nil {
		return &os.LinkError{Op: "rename", Old: from.Name() + "/" + name, New: to.Name() + "/" + name, Err: err}
	}
	return nil
}

func (kernel) exchange(dir *os.File, a, b string) error {
	if err := unix.Renameat2(int(dir.Fd()), a, int(dir.Fd()), b, unix.RENAME_EXCHANGE); err != nil {
		return &os.LinkError{Op: "exchange", Old: dir.Name() + "/" + a, New: dir.Name() + "/" + b, Err: err}
	}
	return nil
}

func (kernel) remove(dir *os.File, name string) error {
	if err := unix.Unlinkat(int(dir.Fd()), name, 0); err != nil {
		return &os.PathError{Op: "remove", Path: dir.Name() + "/" + name, Err: err}
	}
	return nil
}

func (kernel) removeAll(dir *os.File, name string) error {
	// The link leads to the open directory itself, wherever it is now.
	root, err := os.OpenRoot(fmt.Sprintf("/proc/self/fd/%d", dir.Fd()))
	if err != nil {
		return err
	}
	return errclass.Join(root.RemoveAll(name), root.Close())
}

func (kernel) sync(dir *os.File, name string) error {
	f, _, err := regular.Open(int(dir.Fd()), name, beneath)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Fdatasync(int(f.Fd())); err != nil {
		return &os.PathError{Op: "sync", Path: f.Name(), Err: err}
	}
	return nil
}

func (kernel) syncDir(dir *os.File) error {
	// Some file systems cannot, and write directories at once or never.
	if err := unix.Fsync(int(dir.Fd())); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOTSUP) {
		return &os.PathError{Op: "sync", Path: dir.Name(), Err: err}
	}
	return nil
}

// writeOut has the kernel begin to write a part of a file to the disk. It waits
// for nothing but a free place in the disk's queue, and what goes wrong is found
// by the sync.
func writeOut(f *os.File, from, n int64) {
	_ = unix.SyncFileRange(int(f.Fd()), from, n, unix.SYNC_FILE_RANGE_WRITE)
}

// checkPrivate refuses a directory in which others than the caller, who is root,
// can replace what the caller has put there.
func checkPrivate(dir *os.File) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(dir.Fd()), &st); err != nil {
		return &os.PathError{Op: "stat", Path: dir.Name(), Err: err}
	}
	switch {
	case st.Uid != 0 && int(st.Uid) != os.Geteuid():
		return errcode.ForeignWriter.Errorf("directory %s belongs to the user %d, who could replace what is written to it: name one that belongs to root", dir.Name(), st.Uid)
	case st.Mode&0o022 != 0 && st.Mode&unix.S_ISVTX == 0:
		return errcode.ForeignWriter.Errorf("directory %s can be written to by others than its owner, who could replace what is written to it: remove that permission (chmod go-w), or name another one", dir.Name())
	}
	return nil
}
