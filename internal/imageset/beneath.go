// SPDX-License-Identifier: Apache-2.0

package imageset

import (
	"fmt"
	"os"
	"sort"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/budget"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/regular"
)

// Limits bound what is read from a directory that an untrusted party wrote, and
// what that takes of the file system that it is copied to.
type Limits = budget.Limits

// openDir opens a directory for openat2 beneath it. The last element of the
// path must not be a symbolic link.
func openDir(path string) (*os.File, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open directory", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// beneath keeps a path in its directory: no symbolic link, no other mount, no
// "..".
const beneath = unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV | unix.RESOLVE_NO_MAGICLINKS

// openDirBeneath opens a directory below dir. Nothing else is opened, even for
// a moment: the kernel looks before it opens (O_DIRECTORY).
func openDirBeneath(dir *os.File, name string) (*os.File, error) {
	fd, err := regular.Lookup(int(dir.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY, beneath)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: dir.Name() + "/" + name, Err: err}
	}
	return os.NewFile(uintptr(fd), dir.Name()+"/"+name), nil
}

// openRegular opens a file of a flat directory. It accepts only regular files
// with a single link, so that nobody can write to one under another name.
func openRegular(dir *os.File, name string) (*os.File, unix.Stat_t, error) {
	if err := checkName(name); err != nil {
		return nil, unix.Stat_t{}, err
	}
	f, st, err := regular.Open(int(dir.Fd()), name, beneath)
	if err == nil && st.Nlink != 1 {
		f.Close()
		return nil, st, errcode.GuestWroteWrong.Errorf("%q is not a regular file with a single link", name)
	}
	return f, st, err
}

// list returns the sorted names in a directory, at most limit.
func list(dir *os.File, limit int) ([]string, error) {
	if _, err := dir.Seek(0, 0); err != nil {
		return nil, fmt.Errorf("read directory %s: %w", dir.Name(), err)
	}
	names, err := dir.Readdirnames(limit + 1)
	if err != nil && len(names) == 0 && !isEOF(err) {
		return nil, fmt.Errorf("read directory %s: %w", dir.Name(), err)
	}
	if len(names) > limit {
		return nil, fmt.Errorf("%s has more than %d files", dir.Name(), limit)
	}
	sort.Strings(names)
	return names, nil
}
