// SPDX-License-Identifier: Apache-2.0

package imageset

import (
	"errors"
	"fmt"
	"os"
	"sort"

	"golang.org/x/sys/unix"
)

// Limits bound what is read from a directory that an untrusted party wrote.
type Limits struct {
	// Files is the maximum number of files.
	Files int
	// Bytes is the maximum total size.
	Bytes int64
}

// openDir opens a directory for openat2 beneath it. The last element of the
// path must not be a symbolic link.
func openDir(path string) (*os.File, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open directory", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// openDirBeneath opens a directory below dir, never through a symbolic link,
// another mount or "..".
func openDirBeneath(dir *os.File, name string) (*os.File, error) {
	return openAt(dir, name, unix.O_RDONLY|unix.O_DIRECTORY)
}

func openAt(dir *os.File, name string, flags uint64) (*os.File, error) {
	how := &unix.OpenHow{
		Flags:   flags | unix.O_CLOEXEC | unix.O_NOFOLLOW | unix.O_NONBLOCK,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV | unix.RESOLVE_NO_MAGICLINKS,
	}
	for {
		fd, err := unix.Openat2(int(dir.Fd()), name, how)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN) {
			continue
		}
		if err != nil {
			return nil, &os.PathError{Op: "open", Path: dir.Name() + "/" + name, Err: err}
		}
		return os.NewFile(uintptr(fd), dir.Name()+"/"+name), nil
	}
}

// openRegular opens a file of a flat directory. It accepts only regular files
// with a single link, so that nobody can write to one under another name.
func openRegular(dir *os.File, name string) (*os.File, unix.Stat_t, error) {
	var st unix.Stat_t
	if err := checkName(name); err != nil {
		return nil, st, err
	}
	if err := unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return nil, st, &os.PathError{Op: "stat", Path: name, Err: err}
	}
	// Checked before it is opened: opening a device or a FIFO can have effects.
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, st, fmt.Errorf("%q is not a regular file", name)
	}
	f, err := openAt(dir, name, unix.O_RDONLY)
	if err != nil {
		return nil, st, err
	}
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		f.Close()
		return nil, st, &os.PathError{Op: "stat", Path: name, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink != 1 {
		f.Close()
		return nil, st, fmt.Errorf("%q is not a regular file with a single link", name)
	}
	return f, st, nil
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
