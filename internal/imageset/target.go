// SPDX-License-Identifier: Apache-2.0

package imageset

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/signing"
)

// Target is the directory that an engine named for a checkpoint, while the
// image set is assembled inside or beside it. Nothing has its final name before
// [Target.Commit]. Callers end with [Target.Abort], whether they commit or not.
//
// The directory may be below one that somebody else owns, and can be replaced
// at any time. Target holds open what it has checked, and never looks up the
// path again.
type Target struct {
	path string
	disk disk
	// home is the directory at path, and parent the one that it is in.
	home, parent *os.File
	// staging is the name of the directory dir in parent if an earlier image set
	// is to be replaced, else in home. It is empty once there is none.
	staging string
	dir     *os.File
	// replaces: home is an earlier image set, which stays complete until Commit.
	replaces bool
	// synced are the files that are on the disk.
	synced map[string]bool
}

// NewTarget opens a directory for a new image set. The directory must exist and
// be empty, or be an earlier image set, which Commit replaces, and nobody but
// this user may be able to replace what is in it. NewTarget removes what earlier
// attempts left unfinished.
func NewTarget(path string) (*Target, error) { return newTarget(path, kernel{}) }

func newTarget(path string, d disk) (_ *Target, err error) {
	t := &Target{path: filepath.Clean(path), disk: d, synced: make(map[string]bool)}
	defer func() {
		if err != nil {
			err = errclass.Join(err, t.Abort())
		}
	}()
	switch t.home, err = openDir(t.path); {
	case errors.Is(err, fs.ErrNotExist):
		return nil, errcode.ImageDirectory.Errorf("image directory %s does not exist: create it first", path)
	case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP):
		return nil, errcode.ImageDirectory.Errorf("image directory %s is not a directory", path)
	case err != nil:
		return nil, fmt.Errorf("image directory: %w", err)
	}
	if err := checkPrivate(t.home); err != nil {
		return nil, fmt.Errorf("image directory: %w", err)
	}
	if t.parent, err = openParent(t.home); err != nil {
		return nil, fmt.Errorf("image directory: %w", err)
	}
	if t.replaces, err = t.holdsImageSet(); err != nil {
		return nil, err
	}
	if t.replaces {
		// Beside it, so that the two can be exchanged atomically.
		if err := t.checkExchange(); err != nil {
			return nil, fmt.Errorf("replace the earlier checkpoint in %s: %w; or name an empty directory", t.path, err)
		}
	}
	if err := t.makeStaging(); err != nil {
		return nil, err
	}
	return t, nil
}

// around is the directory that the staging directory is in.
func (t *Target) around() *os.File {
	if t.replaces {
		return t.parent
	}
	return t.home
}

// openParent opens the directory that a directory is in now.
func openParent(dir *os.File) (*os.File, error) {
	fd, err := unix.Openat(int(dir.Fd()), "..", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: dir.Name() + "/..", Err: err}
	}
	return os.NewFile(uintptr(fd), filepath.Dir(dir.Name())), nil
}

// checkExchange checks that the earlier image set can be replaced by its name in
// its parent, and removes what earlier attempts have left there.
func (t *Target) checkExchange() error {
	if err := checkPrivate(t.parent); err != nil {
		return err
	}
	if err := t.checkPlace(); err != nil {
		return err
	}
	_, err := removeUnfinished(t.disk, t.parent)
	return err
}

// checkPlace checks that the parent still has the directory under its name.
func (t *Target) checkPlace() error {
	var home, named unix.Stat_t
	if err := unix.Fstat(int(t.home.Fd()), &home); err != nil {
		return err
	}
	err := unix.Fstatat(int(t.parent.Fd()), filepath.Base(t.path), &named, unix.AT_SYMLINK_NOFOLLOW)
	if err != nil || home.Dev != named.Dev || home.Ino != named.Ino {
		return errcode.ImageDirectory.Errorf("%s is no longer the directory that it was", t.path)
	}
	return nil
}

// makeStaging makes the directory for the files, which is locked as long as it is
// open.
func (t *Target) makeStaging() error {
	around := t.around()
	for {
		name := stagingPrefix + randomName()
		if err := unix.Mkdirat(int(around.Fd()), name, 0o700); err != nil {
			return errcode.ImageDirectory.Errorf("image directory %s cannot be written to: name another one: %w", t.path, err)
		}
		t.staging = name
		dir, err := openDirBeneath(around, name)
		if err != nil {
			return fmt.Errorf("image directory: %w", err)
		}
		t.dir = dir
		// Until it is locked it looks like one that its writer has left.
		lock := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		var st unix.Stat_t
		if lock == nil && unix.Fstat(int(dir.Fd()), &st) == nil && st.Nlink > 0 {
			return nil
		}
		if lock != nil && !errors.Is(lock, unix.EWOULDBLOCK) {
			return fmt.Errorf("lock %s: %w", dir.Name(), lock)
		}
		t.staging, t.dir = "", nil
		if err := dir.Close(); err != nil {
			return err
		}
	}
}

// Dir is the directory for the files of the image set.
func (t *Target) Dir() *os.File { return t.dir }

// holdsImageSet reports whether there is an earlier image set to replace: a
// manifest, and nothing but images beside it. It may be damaged, as one that a
// release which did not wait for the disk wrote before a power loss.
func (t *Target) holdsImageSet() (bool, error) {
	busy, err := removeUnfinished(t.disk, t.home)
	if busy {
		err = errcode.ImageDirectory.Wrap(errors.New("another checkpoint is being written to it"))
	}
	if err != nil {
		return false, fmt.Errorf("image directory %s: %w", t.path, err)
	}
	names, err := list(t.home, maxEntries)
	if err != nil {
		return false, fmt.Errorf("image directory: %w", err)
	}
	if len(names) == 0 {
		return false, nil
	}
	for _, name := range names {
		var st unix.Stat_t
		err := unix.Fstatat(int(t.home.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW)
		if err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || !isOurs(name) && !IsImage(name) {
			return false, errcode.ImageDirectory.Errorf("image directory %s is not empty (it has %s) and not an earlier checkpoint: name an empty directory", t.path, name)
		}
	}
	if !slices.Contains(names, ManifestName) {
		return false, errcode.ImageDirectory.Errorf("image directory %s is not empty (it has %s) and not an earlier checkpoint: name an empty directory", t.path, names[0])
	}
	return true, nil
}

// Sync waits until files of the image set are on the disk. Commit does so for
// the others, and callers that have nothing to do meanwhile need not call Sync.
func (t *Target) Sync(ctx context.Context, files []File) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(syncs)
	for _, f := range files {
		if t.synced[f.Name] {
			continue
		}
		group.Go(func() error {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			return t.disk.sync(t.dir, f.Name)
		})
	}
	if err := group.Wait(); err != nil {
		return fmt.Errorf("write image set to the disk: %w", err)
	}
	for _, f := range files {
		t.synced[f.Name] = true
	}
	return nil
}

// syncs is how many files are synced at the same time.
const syncs = 8

// Commit writes the manifest and its signature, and moves the files to their
// final names, the manifest last. Without a key it is not signed. It returns once all of that is on the disk; a power loss before
// leaves what was there before NewTarget, or the new image set. After an error
// the directory is as it was before NewTarget. Abort then removes what is left.
func (t *Target) Commit(ctx context.Context, m *Manifest, key *signing.Key) error {
	m.FormatVersion = FormatVersion
	if key != nil {
		m.SignedBy = signing.Fingerprint(key.Public())
	}
	data, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return fmt.Errorf("write manifest: %w", err)
	}
	data = append(data, '\n')
	// What no restore would read is not a checkpoint. Parts are the guest's word.
	if _, err := parseManifest(data); err != nil {
		return fmt.Errorf("write manifest: %w", err)
	}
	if err := t.Sync(ctx, m.Files); err != nil {
		return err
	}
	if err := t.write(ManifestName, data); err != nil {
		return fmt.Errorf("write manifest: %w", err)
	}
	if key != nil {
		if err := t.write(SignatureName, key.Sign(data)); err != nil {
			return fmt.Errorf("sign manifest: %w", err)
		}
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if t.replaces {
		return t.exchange()
	}
	names := make([]string, 0, len(m.Files)+2)
	for _, f := range m.Files {
		names = append(names, f.Name)
	}
	if key != nil {
		names = append(names, SignatureName)
	}
	if err := t.moveIn(append(names, ManifestName)); err != nil {
		return errclass.Join(fmt.Errorf("finish checkpoint: %w", err), rollBack(t.disk, t.home, t.dir))
	}
	return nil
}

// write writes a file of the image set to the disk.
func (t *Target) write(name string, content []byte) error {
	if err := t.disk.create(t.dir, name, content); err != nil {
		return err
	}
	return t.disk.sync(t.dir, name)
}

// moveIn moves files to their final names. The last one makes them an image set,
// so that it comes when all others are on the disk.
func (t *Target) moveIn(names []string) error {
	moved, err := json.Marshal(names)
	if err != nil {
		return err
	}
	if err := t.write(committingName, moved); err != nil {
		return err
	}
	if err := t.disk.syncDir(t.dir); err != nil {
		return err
	}
	last := len(names) - 1
	for _, n := range names[:last] {
		if err := t.disk.rename(t.dir, t.home, n); err != nil {
			return err
		}
	}
	if err := t.syncDirs(t.home, t.dir, t.parent); err != nil { // home may be new
		return err
	}
	if err := t.disk.rename(t.dir, t.home, names[last]); err != nil {
		return err
	}
	if err := t.syncDirs(t.home, t.dir); err != nil {
		// Back, for the caller is going to hear that there is no image set.
		return errclass.Join(err, t.disk.rename(t.home, t.dir, names[last]))
	}
	return nil
}

func (t *Target) syncDirs(dirs ...*os.File) error {
	for _, dir := range dirs {
		if err := t.disk.syncDir(dir); err != nil {
			return err
		}
	}
	return nil
}

// exchange swaps the new image set with the earlier one, which Abort removes.
func (t *Target) exchange() error {
	fail := func(err error) error {
		return fmt.Errorf("replace the earlier checkpoint in %s: %w; name an empty directory", t.path, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(t.home.Fd()), &st); err != nil {
		return fail(err)
	}
	if err := unix.Fchmod(int(t.dir.Fd()), st.Mode&0o7777); err != nil {
		return fail(err)
	}
	if err := t.checkPlace(); err != nil {
		return fail(err)
	}
	if err := t.syncDirs(t.dir, t.parent); err != nil {
		return fail(err)
	}
	if err := t.disk.exchange(t.parent, t.staging, filepath.Base(t.path)); err != nil {
		return fail(err)
	}
	if err := t.disk.syncDir(t.parent); err != nil {
		return fail(errclass.Join(err, t.disk.exchange(t.parent, t.staging, filepath.Base(t.path))))
	}
	return nil
}

// Abort removes what is unfinished, or what Commit has replaced.
func (t *Target) Abort() (err error) {
	if t.staging != "" {
		// An empty one, at least, takes no descriptor, of which there may be none left.
		if unix.Unlinkat(int(t.around().Fd()), t.staging, unix.AT_REMOVEDIR) != nil {
			err = t.disk.removeAll(t.around(), t.staging)
		}
		t.staging = ""
	}
	for _, f := range []**os.File{&t.dir, &t.home, &t.parent} {
		if *f != nil {
			err = errclass.Join(err, (*f).Close())
			*f = nil
		}
	}
	return err
}

func randomName() string {
	b := make([]byte, 8)
	_, _ = rand.Read(b) // never fails (crypto/rand)
	return hex.EncodeToString(b)
}

// stagingPrefix starts the name of a directory with an unfinished image set.
// checkName rejects such names, so that it is never mistaken for a part of one.
const stagingPrefix = ".kata-checkpoint-"

// isStagingName reports whether randomName has made a name.
func isStagingName(name string) bool {
	random, found := strings.CutPrefix(name, stagingPrefix)
	return found && len(random) == 16 && strings.Trim(random, "0123456789abcdef") == ""
}
