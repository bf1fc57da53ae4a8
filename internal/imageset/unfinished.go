// SPDX-License-Identifier: Apache-2.0

package imageset

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// committingName is a file in a staging directory as soon as its files get their
// final names: a list of them, in the order in which they move. No file of an
// image set has that name.
const committingName = ".committing"

// maxEntries bounds what is read of a directory of the engine's.
const maxEntries = 1 << 20

// IsStaging reports whether a path is that of an unfinished image set.
func IsStaging(path string) bool {
	return filepath.IsAbs(path) && isStagingName(filepath.Base(path))
}

// RemoveStaging removes an unfinished image set whose writer is gone, including
// those of its files that already have their final names.
func RemoveStaging(path string) error {
	if !IsStaging(path) {
		return fmt.Errorf("%q is not an unfinished image set", path)
	}
	dir, err := openDir(filepath.Dir(path))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		defer dir.Close()
		if err = checkPrivate(dir); err == nil {
			err = removeStaging(kernel{}, dir, filepath.Base(path))
		}
	}
	if err != nil {
		return fmt.Errorf("remove an unfinished checkpoint: %w", err)
	}
	return nil
}

// removeUnfinished removes what earlier attempts left in a directory, unless
// one is still in progress: then it reports that it is busy.
func removeUnfinished(d disk, dir *os.File) (busy bool, err error) {
	names, err := list(dir, maxEntries)
	if err != nil {
		return false, err
	}
	for _, name := range names {
		if !isStagingName(name) {
			continue
		}
		if err := removeStaging(d, dir, name); errors.Is(err, errBusy) {
			busy = true
		} else if err != nil {
			return busy, fmt.Errorf("remove an unfinished checkpoint: %w", err)
		}
	}
	return busy, nil
}

var errBusy = errors.New("its writer is still running")

// removeStaging removes an unfinished image set by its name in dir, unless it is
// locked or somebody else's.
func removeStaging(d disk, dir *os.File, name string) error {
	staging, err := openDirBeneath(dir, name)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return nil
	}
	if err != nil {
		return err
	}
	defer staging.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(staging.Fd()), &st); err != nil || int(st.Uid) != os.Geteuid() {
		return err
	}
	if err := unix.Flock(int(staging.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return errBusy
	}
	if err := rollBack(d, dir, staging); err != nil {
		return err
	}
	return d.removeAll(dir, name)
}

// rollBack removes the files that an interrupted Commit has moved from staging
// to home: those in its list that are no longer in the staging directory. The
// manifest moves last.
func rollBack(d disk, home, staging *os.File) error {
	moved, err := readCommitting(staging)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // nothing has moved
	}
	if err != nil {
		return err
	}
	if there, err := exists(staging, ManifestName); err != nil || !there {
		return err // it has moved: the image set is complete
	}
	if len(moved) == 0 {
		// An earlier release wrote no list, and did not wait for the disk either.
		// It began with an empty directory, too.
		if moved, err = list(home, maxEntries); err != nil {
			return err
		}
	}
	for _, name := range moved {
		if !IsImage(name) && name != SignatureName {
			continue
		}
		if there, err := exists(staging, name); err != nil {
			return err
		} else if there {
			continue
		}
		if err := d.remove(home, name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	// Before the list is removed.
	return d.syncDir(home)
}

// readCommitting reads the list of a Commit. One that was not written in full is
// empty: nothing has moved, or it is an earlier release's.
func readCommitting(staging *os.File) (names []string, err error) {
	fd, err := unix.Openat(int(staging.Fd()), committingName, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: staging.Name() + "/" + committingName, Err: err}
	}
	f := os.NewFile(uintptr(fd), committingName)
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxManifest))
	if err != nil {
		return nil, err
	}
	if json.Unmarshal(data, &names) != nil {
		return nil, nil
	}
	return names, nil
}

func exists(dir *os.File, name string) (bool, error) {
	var st unix.Stat_t
	err := unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	return err == nil, err
}
