// SPDX-License-Identifier: Apache-2.0

package install

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	continuity "github.com/containerd/continuity/fs"
	"golang.org/x/sys/unix"
)

// tree is the guest bundle of a release.
type tree struct {
	dir    string
	digest string
	bytes  int64
}

// readTree returns the digest of a guest bundle: of the names in it, what can be
// executed, and all content.
func readTree(dir string) (*tree, error) {
	if _, err := os.Stat(filepath.Join(dir, "bin/kata-checkpoint-agent")); err != nil {
		return nil, err
	}
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return nil, err
	}
	t := &tree{dir: dir}
	sum := sha256.New()
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		st, err := d.Info()
		if err != nil {
			return err
		}
		fmt.Fprintf(sum, "%q %v %t ", name, st.Mode().Type(), st.Mode()&0o100 != 0)
		switch {
		case st.Mode()&fs.ModeSymlink != 0:
			target, err := os.Readlink(path)
			fmt.Fprintf(sum, "%q ", target)
			return err
		case st.Mode().IsRegular():
			fmt.Fprintf(sum, "%d ", st.Size())
			t.bytes += st.Size()
			file, err := os.Open(path) //nolint:gosec // the release is the operator's
			if err != nil {
				return err
			}
			defer file.Close()
			_, err = io.Copy(sum, file)
			return err
		case st.IsDir():
			return nil
		}
		return fmt.Errorf("%s is neither a file, a directory nor a symbolic link", path)
	})
	t.digest = hex.EncodeToString(sum.Sum(nil))
	return t, err
}

// copyTo copies the tree to a directory that does not exist. It appears as a
// whole, is on the disk then, belongs to root, and nobody else can write to it.
func (t *tree) copyTo(dir string) error {
	staged := dir + ".new"
	if err := os.RemoveAll(staged); err != nil {
		return err
	}
	if err := continuity.CopyDir(staged, t.dir); err != nil {
		return err
	}
	err := filepath.WalkDir(staged, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if os.Geteuid() == 0 {
			if err := os.Lchown(path, 0, 0); err != nil { //nolint:gosec // our copy, in a directory of root's
				return err
			}
		}
		if d.Type()&fs.ModeSymlink != 0 {
			return nil
		}
		st, err := d.Info()
		if err != nil {
			return err
		}
		mode := fs.FileMode(0o644)
		if st.Mode()&0o100 != 0 {
			mode = 0o755
		}
		return os.Chmod(path, mode) //nolint:gosec // likewise
	})
	if err != nil {
		return err
	}
	if err := syncAll(staged); err != nil {
		return err
	}
	return os.Rename(staged, dir)
}

// syncAll writes the file system of a directory to the disk.
func syncAll(dir string) error {
	file, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer file.Close()
	return unix.Syncfs(int(file.Fd()))
}
