// SPDX-License-Identifier: Apache-2.0

package imageset

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// stagingPrefix starts the name of a directory with an unfinished image set.
// checkName rejects such names, so that it is never mistaken for a part of one.
const stagingPrefix = ".kata-checkpoint-"

// committingName is a file in such a directory as soon as its files get their
// final names. No file of an image set has that name.
const committingName = ".committing"

// IsStaging reports whether a path is that of an unfinished image set.
func IsStaging(path string) bool {
	return filepath.IsAbs(path) && strings.HasPrefix(filepath.Base(path), stagingPrefix)
}

// Target is the directory that an engine named for a checkpoint, while the
// image set is assembled inside or beside it. It ends with [Target.Commit] or
// [Target.Abort]; nothing has its final name before Commit.
type Target struct {
	path    string
	staging string
	dir     *os.File
	// replaces: path is an earlier image set, which stays complete until Commit.
	replaces bool
}

// NewTarget opens a directory for a new image set. The directory must exist and
// be empty, or be an earlier image set, which Commit replaces. NewTarget
// removes what earlier attempts left unfinished.
func NewTarget(path string) (*Target, error) {
	st, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("image directory %s does not exist: create it first", path)
	case err != nil:
		return nil, fmt.Errorf("image directory: %w", err)
	case !st.IsDir():
		return nil, fmt.Errorf("image directory %s is not a directory", path)
	}
	t := &Target{path: path}
	if t.replaces, err = t.holdsImageSet(); err != nil {
		return nil, err
	}
	name := stagingPrefix + randomName()
	t.staging = filepath.Join(path, name)
	if t.replaces {
		// Beside it, so that the two can be exchanged atomically.
		t.staging = filepath.Join(filepath.Dir(filepath.Clean(path)), name)
	}
	if err := os.Mkdir(t.staging, 0o700); err != nil {
		return nil, fmt.Errorf("image directory %s cannot be written to: name another one: %w", path, err)
	}
	if t.dir, err = openDir(t.staging); err != nil {
		return nil, errors.Join(err, os.RemoveAll(t.staging))
	}
	if err := unix.Flock(int(t.dir.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", t.staging, err), t.Abort())
	}
	return t, nil
}

// Dir is the directory for the files of the image set.
func (t *Target) Dir() *os.File { return t.dir }

// holdsImageSet reports whether there is an earlier image set to replace.
func (t *Target) holdsImageSet() (bool, error) {
	if err := removeUnfinished(t.path); err != nil {
		return false, fmt.Errorf("image directory %s: %w", t.path, err)
	}
	entries, err := os.ReadDir(t.path)
	if err != nil {
		return false, fmt.Errorf("image directory: %w", err)
	}
	manifest, other := false, ""
	for _, e := range entries {
		switch {
		case e.Name() == ManifestName:
			manifest = true
		default:
			other = e.Name()
		}
	}
	if !manifest {
		if other != "" {
			return false, fmt.Errorf("image directory %s is not empty (it has %s) and not an earlier checkpoint: name an empty directory", t.path, other)
		}
		return false, nil
	}
	s, err := Open(t.path)
	if err != nil {
		return false, fmt.Errorf("image directory %s is neither empty nor a complete earlier checkpoint: name an empty directory (%w)", t.path, err)
	}
	return true, s.Close()
}

// removeUnfinished removes what earlier attempts left in a directory, unless
// one is still in progress.
func removeUnfinished(path string) error {
	entries, err := os.ReadDir(path)
	for _, e := range entries {
		if e.IsDir() && strings.HasPrefix(e.Name(), stagingPrefix) {
			err = errors.Join(err, removeUnlocked(filepath.Join(path, e.Name())))
		}
	}
	return err
}

// removeUnlocked removes an unfinished image set, unless it is locked: then
// another checkpoint is still writing it.
func removeUnlocked(path string) error {
	dir, err := openDir(path)
	if err != nil {
		return fmt.Errorf("unfinished checkpoint: %w", err)
	}
	defer dir.Close()
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return errors.New("another checkpoint is being written to it")
	}
	return RemoveStaging(path)
}

// RemoveStaging removes an unfinished image set whose writer is gone, including
// those of its files that already have their final names.
func RemoveStaging(path string) error {
	if !IsStaging(path) {
		return fmt.Errorf("%q is not an unfinished image set", path)
	}
	if err := rollBack(path); err != nil {
		return fmt.Errorf("remove an unfinished checkpoint: %w", err)
	}
	if err := os.RemoveAll(path); err != nil {
		return fmt.Errorf("remove an unfinished checkpoint: %w", err)
	}
	return nil
}

// rollBack removes the files that an interrupted Commit has moved to their
// final names: those that the manifest, which moves last, lists and that are no
// longer in the staging directory.
func rollBack(staging string) error {
	if _, err := os.Lstat(filepath.Join(staging, committingName)); err != nil {
		return nil // nothing has moved
	}
	f, err := os.Open(filepath.Join(staging, ManifestName))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // it has moved: the image set is complete
	}
	if err != nil {
		return err
	}
	defer f.Close()
	m, err := ReadManifest(f)
	if err != nil {
		return err
	}
	for _, file := range m.Files { // decode allows flat names only
		if _, err := os.Lstat(filepath.Join(staging, file.Name)); !errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err := os.Remove(filepath.Join(filepath.Dir(staging), file.Name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// Commit writes the manifest and moves the files to their final names, the
// manifest last. After an error the directory is as it was before NewTarget.
func (t *Target) Commit(m *Manifest) (err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, t.Abort())
		}
	}()
	m.FormatVersion = FormatVersion
	data, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return fmt.Errorf("write manifest: %w", err)
	}
	// What no restore would read is not a checkpoint. Parts are the guest's word.
	if _, err := ReadManifest(bytes.NewReader(data)); err != nil {
		return fmt.Errorf("write manifest: %w", err)
	}
	if err := os.WriteFile(filepath.Join(t.staging, ManifestName), append(data, '\n'), 0o600); err != nil {
		return fmt.Errorf("write manifest: %w", err)
	}
	if t.replaces {
		return t.exchange()
	}
	if err := os.WriteFile(filepath.Join(t.staging, committingName), nil, 0o600); err != nil {
		return fmt.Errorf("finish checkpoint: %w", err)
	}
	names := make([]string, 0, len(m.Files)+1)
	for _, f := range m.Files {
		names = append(names, f.Name)
	}
	for i, n := range append(names, ManifestName) {
		if err := os.Rename(filepath.Join(t.staging, n), filepath.Join(t.path, n)); err != nil {
			for _, moved := range names[:min(i, len(names))] {
				err = errors.Join(err, os.Remove(filepath.Join(t.path, moved)))
			}
			return fmt.Errorf("finish checkpoint: %w", err)
		}
	}
	return t.Abort()
}

// exchange swaps the new image set with the earlier one, which it removes.
func (t *Target) exchange() error {
	st, err := os.Stat(t.path)
	if err != nil {
		return fmt.Errorf("image directory: %w", err)
	}
	if err := os.Chmod(t.staging, st.Mode().Perm()); err != nil {
		return fmt.Errorf("image directory: %w", err)
	}
	if err := unix.Renameat2(unix.AT_FDCWD, t.staging, unix.AT_FDCWD, t.path, unix.RENAME_EXCHANGE); err != nil {
		return fmt.Errorf("replace the earlier checkpoint in %s: %w; name an empty directory", t.path, err)
	}
	return t.Abort()
}

// Abort removes what is unfinished. It does nothing after Commit.
func (t *Target) Abort() error {
	if t.dir == nil {
		return nil
	}
	err := t.dir.Close()
	t.dir = nil
	return errors.Join(err, os.RemoveAll(t.staging))
}

func randomName() string {
	b := make([]byte, 8)
	_, _ = rand.Read(b) // never fails (crypto/rand)
	return hex.EncodeToString(b)
}
