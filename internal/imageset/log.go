// SPDX-License-Identifier: Apache-2.0

package imageset

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// ReadFile returns a small file that the guest wrote beneath src/name, or the
// last limit bytes of it.
func ReadFile(src, name, file string, limit int64) ([]byte, error) {
	top, err := openDir(src)
	if err != nil {
		return nil, err
	}
	defer top.Close()
	dir, err := openDirBeneath(top, name)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	f, st, err := openRegular(dir, file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.NewSectionReader(f, max(0, st.Size-limit), limit))
}

// WriteLog writes a file into a directory that the engine named, in place of an
// earlier one. It makes the directory, but not those above it. Nobody else may
// be able to replace what is in it.
func WriteLog(path, name string, data []byte) error {
	dir, err := openDir(path)
	if errors.Is(err, fs.ErrNotExist) {
		dir, err = makeDir(path)
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := checkPrivate(dir); err != nil {
		return err
	}
	if err := (kernel{}).remove(dir, name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return kernel{}.create(dir, name, data)
}

func makeDir(path string) (*os.File, error) {
	path = filepath.Clean(path)
	parent, err := os.OpenFile(filepath.Dir(path), os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	defer parent.Close()
	if err := checkPrivate(parent); err != nil {
		return nil, err
	}
	name := filepath.Base(path)
	if err := unix.Mkdirat(int(parent.Fd()), name, 0o700); err != nil && !errors.Is(err, unix.EEXIST) {
		return nil, fmt.Errorf("make directory %s: %w", path, err)
	}
	return openDirBeneath(parent, name)
}
