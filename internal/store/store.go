// SPDX-License-Identifier: Apache-2.0

// Package store keeps the checkpoints that the command kata-checkpoint makes,
// by name, in <state_dir>/checkpoints:
//
//	NAME/                        belongs to root, mode 0700
//	  checkpoint/                the image set, as the shim writes it
//	  rootfs-diff.tar            the changes of the root file system
//	  spec.dump config.dump status.dump
//	                             what engines and checkpointctl read
//	  dump.log stats-dump        CRIU's log and statistics
//	  kata-checkpoint-record.json
//	                             written last: what it was made of, and the
//	                             digests of all other files but the image set's
//	  .keep                      there is one as long as prune keeps it
//	.new-*, .old-*               what is being made, or removed
//
// Apart from the record that is the layout of the CRI's archives, unpacked.
//
// Whoever makes or reads a checkpoint has a lock (flock) on its directory, so
// that nobody removes it meanwhile, and what a killed command has left is found
// by that nobody has its lock.
package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
	"github.com/kata-checkpoint/kata-checkpoint/internal/regular"
	"github.com/kata-checkpoint/kata-checkpoint/internal/remove"
)

// Names of files in a checkpoint's directory; the others are in package
// imageset.
const (
	RecordName = "kata-checkpoint-record.json"
	KeepName   = ".keep"
	SpecName   = "spec.dump"
	ConfigName = "config.dump"
	StatusName = "status.dump"
)

// Extras are the files of a checkpoint beside its image set, the record
// excepted, in the order in which an archive has them.
var Extras = []string{ConfigName, SpecName, StatusName, imageset.StatsName, imageset.DumpLogName, imageset.RootfsDiffName}

const (
	// dirName is below state_dir.
	dirName   = "checkpoints"
	newPrefix = ".new-"
	oldPrefix = ".old-"
	// recordVersion is that of the records that this release writes. It reads
	// older ones, too: version 1 has SHA-256 as digests.
	recordVersion = 2
	// maxRecord bounds a record, in bytes.
	maxRecord = 1 << 20
)

// Errors of Open and Begin.
var (
	ErrNotFound = errcode.NoCheckpoint.Wrap(errors.New("there is no such checkpoint"))
	ErrExists   = errcode.CheckpointExists.Wrap(errors.New("there is a checkpoint of this name already"))
	ErrInUse    = errcode.CheckpointInUse.Wrap(errors.New("it is being read or made by another kata-checkpoint: try again when that is done"))
)

// names are those that a checkpoint can have: they become names of files, and
// of archives in annotations.
var names = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$`)

// CheckName reports whether a checkpoint can have a name.
func CheckName(name string) error {
	if !names.MatchString(name) || strings.Contains(name, "..") {
		return errcode.CheckpointName.Errorf("%q cannot be the name of a checkpoint: use up to 128 letters, digits, '_', '.' and '-', the first a letter or digit", name)
	}
	return nil
}

// Record is what a checkpoint was made of.
type Record struct {
	Version int    `json:"version"`
	Name    string `json:"name"`
	// Group is the name that all checkpoints of a pod have in common that were
	// made in one instant.
	Group   string    `json:"group,omitempty"`
	Created time.Time `json:"created"`
	// Engine is the one that the container belongs to: containerd (ctr), nerdctl,
	// docker, cri.
	Engine    string `json:"engine"`
	Namespace string `json:"namespace"`
	// Container is its ID, ContainerName the name that its engine has for it.
	Container     string `json:"container"`
	ContainerName string `json:"containerName,omitempty"`
	Pod           *Pod   `json:"pod,omitempty"`
	Image         string `json:"image,omitempty"`
	Runtime       string `json:"runtime,omitempty"`
	// Stopped: the container was stopped by the checkpoint.
	Stopped bool `json:"stopped"`
	// Took is the duration of the whole checkpoint, Frozen that of the
	// container's freeze.
	Took   time.Duration `json:"nanoseconds"`
	Frozen time.Duration `json:"frozenNanoseconds"`
	// Imported is the archive that it comes from, where it was not made here.
	Imported string `json:"imported,omitempty"`
	// Files are those beside the image set.
	Files []imageset.File `json:"files"`
}

// Pod is the pod of a container.
type Pod struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	UID       string `json:"uid,omitempty"`
	Sandbox   string `json:"sandbox,omitempty"`
}

// Of is the container for a reader: its name, else its ID.
func (r *Record) Of() string {
	name := r.ContainerName
	if name == "" {
		name = r.Container
	}
	if r.Pod != nil {
		return r.Pod.Namespace + "/" + r.Pod.Name + "/" + name
	}
	return name
}

// Store is a directory of checkpoints.
type Store struct{ dir string }

// New returns the store below a state directory, which need not exist.
func New(stateDir string) *Store { return &Store{filepath.Join(stateDir, dirName)} }

// Dir is the store's directory.
func (s *Store) Dir() string { return s.dir }

// lock opens and locks a directory. Its error wraps [unix.EWOULDBLOCK] if it is
// locked.
func lock(path string, how int) (*os.File, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	f := os.NewFile(uintptr(fd), path)
	if err := unix.Flock(fd, how|unix.LOCK_NB); err != nil {
		return nil, errclass.Join(&fs.PathError{Op: "lock", Path: path, Err: err}, f.Close())
	}
	return f, nil
}

// prepare makes the store's directory and removes what killed commands left.
func (s *Store) prepare() error {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return err
	}
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), newPrefix) && !strings.HasPrefix(e.Name(), oldPrefix) {
			continue
		}
		path := filepath.Join(s.dir, e.Name())
		l, err := lock(path, unix.LOCK_EX)
		if err != nil {
			continue // in use, or gone
		}
		err = remove.All(path)
		if err := errclass.Join(err, l.Close()); err != nil {
			return err
		}
	}
	return nil
}

// Draft is a checkpoint that is being made. Callers end with [Draft.Abort],
// whether they have committed it or not.
type Draft struct {
	s    *Store
	name string
	path string
	lock *os.File
}

// Begin starts a checkpoint. Its error wraps [ErrExists] where there is one of
// that name.
func (s *Store) Begin(name string) (*Draft, error) {
	if err := CheckName(name); err != nil {
		return nil, err
	}
	if err := s.prepare(); err != nil {
		return nil, fmt.Errorf("checkpoint directory: %w", err)
	}
	if _, err := os.Lstat(filepath.Join(s.dir, name)); err == nil {
		return nil, fmt.Errorf("%s: %w: choose another one, or remove it (kata-checkpoint rm %s)", name, ErrExists, name)
	}
	for {
		path, err := os.MkdirTemp(s.dir, newPrefix)
		if err != nil {
			return nil, fmt.Errorf("checkpoint directory: %w", err)
		}
		l, err := lock(path, unix.LOCK_EX)
		if errors.Is(err, unix.EWOULDBLOCK) || errors.Is(err, fs.ErrNotExist) {
			continue // another command took it for one that was left
		}
		if err != nil {
			return nil, errclass.Join(fmt.Errorf("checkpoint directory: %w", err), os.Remove(path))
		}
		if _, err := os.Lstat(path); err != nil {
			l.Close()
			continue
		}
		d := &Draft{s: s, name: name, path: path, lock: l}
		if err := os.Mkdir(d.Images(), 0o700); err != nil {
			return nil, errclass.Join(err, d.Abort())
		}
		return d, nil
	}
}

// Path is the draft's directory.
func (d *Draft) Path() string { return d.path }

// File is the path of one of the draft's files.
func (d *Draft) File(name string) string { return filepath.Join(d.path, name) }

// Images is the directory for the image set.
func (d *Draft) Images() string { return d.File(imageset.ArchiveImages) }

// Commit writes the record, with the digests of the files beside the image set,
// and gives the checkpoint its name once all of it is on the disk.
func (d *Draft) Commit(ctx context.Context, r *Record) error {
	r.Version, r.Name, r.Files = recordVersion, d.name, nil
	for _, name := range Extras {
		file, err := describe(ctx, d.path, name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		r.Files = append(r.Files, file)
	}
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(d.File(RecordName), append(data, '\n'), 0o600); err != nil {
		return err
	}
	for _, name := range append(slices.Clone(Extras), RecordName, imageset.ArchiveImages, ".") {
		if err := syncFile(d.File(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	target := filepath.Join(d.s.dir, d.name)
	err = unix.Renameat2(unix.AT_FDCWD, d.path, unix.AT_FDCWD, target, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("%s: %w: another kata-checkpoint has made it meanwhile", d.name, ErrExists)
	}
	if err != nil {
		return fmt.Errorf("rename %s to %s: %w", d.path, target, err)
	}
	d.path = ""
	return syncFile(d.s.dir)
}

// Abort removes what was not committed.
func (d *Draft) Abort() (err error) {
	if d.path != "" {
		err = remove.All(d.path)
		d.path = ""
	}
	if d.lock != nil {
		err = errclass.Join(err, d.lock.Close())
		d.lock = nil
	}
	return err
}

func syncFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errclass.Join(f.Sync(), f.Close())
}

// describe reads one of the files beside the image set.
func describe(ctx context.Context, dir, name string) (imageset.File, error) {
	f, _, err := regular.Open(unix.AT_FDCWD, filepath.Join(dir, name), 0)
	if err != nil {
		return imageset.File{}, err
	}
	defer f.Close()
	return imageset.Describe(ctx, name, f)
}

// matches reads one of the files beside the image set and reports whether it is
// as the record has it.
func matches(ctx context.Context, dir string, want imageset.File) (bool, error) {
	f, _, err := regular.Open(unix.AT_FDCWD, filepath.Join(dir, want.Name), 0)
	if err != nil {
		return false, err
	}
	defer f.Close()
	return want.Matches(ctx, f)
}

// Checkpoint is one in the store.
type Checkpoint struct {
	*Record
	Path string
	// Keep: prune leaves it alone.
	Keep bool
	// Size is that of all its files, in bytes.
	Size int64
	// Damage is why its record cannot be read, nil if it can.
	Damage error
}

// Images is the directory with its image set.
func (c *Checkpoint) Images() string { return filepath.Join(c.Path, imageset.ArchiveImages) }

// File is the path of one of its files.
func (c *Checkpoint) File(name string) string { return filepath.Join(c.Path, name) }

// Lock keeps it from being removed until the result is closed.
func (c *Checkpoint) Lock() (io.Closer, error) {
	l, err := lock(c.Path, unix.LOCK_SH)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, fmt.Errorf("checkpoint %s: %w", c.Name, ErrInUse)
	}
	return l, err
}

// Open returns a checkpoint. Its error wraps [ErrNotFound] if no checkpoint has
// that name; one with a damaged record is returned with its damage.
func (s *Store) Open(name string) (*Checkpoint, error) {
	if err := CheckName(name); err != nil {
		return nil, err
	}
	path := filepath.Join(s.dir, name)
	st, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !st.IsDir() {
		return nil, fmt.Errorf("%s: %w: kata-checkpoint ls lists them", name, ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	return open(path, name), nil
}

func open(path, name string) *Checkpoint {
	c := &Checkpoint{Path: path, Record: &Record{Name: name}}
	_, err := os.Lstat(c.File(KeepName))
	c.Keep = err == nil
	_ = filepath.WalkDir(path, func(_ string, d fs.DirEntry, err error) error { // what cannot be read counts as nothing
		if err != nil || d.IsDir() {
			return nil //nolint:nilerr // see above
		}
		if info, err := d.Info(); err == nil {
			c.Size += info.Size()
		}
		return nil
	})
	r, err := readRecord(c.File(RecordName))
	if err != nil {
		c.Damage = errcode.Record.Errorf("its record cannot be read: %w", err)
		return c
	}
	r.Name = name // it may have been renamed
	c.Record = r
	return c
}

func readRecord(path string) (*Record, error) {
	f, _, err := regular.Open(unix.AT_FDCWD, path, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return ParseRecord(f)
}

// ParseRecord reads a record.
func ParseRecord(from io.Reader) (*Record, error) {
	data, err := io.ReadAll(io.LimitReader(from, maxRecord+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxRecord {
		return nil, fmt.Errorf("it is larger than %d bytes", maxRecord)
	}
	r := &Record{}
	if err := json.Unmarshal(data, r); err != nil {
		return nil, err
	}
	if r.Version < 1 || r.Version > recordVersion {
		return nil, fmt.Errorf("it has version %d and this kata-checkpoint reads 1 to %d", r.Version, recordVersion)
	}
	return r, nil
}

// List returns all checkpoints, the oldest first.
func (s *Store) List() ([]*Checkpoint, error) {
	entries, err := os.ReadDir(s.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var list []*Checkpoint
	for _, e := range entries {
		if e.IsDir() && CheckName(e.Name()) == nil {
			list = append(list, open(filepath.Join(s.dir, e.Name()), e.Name()))
		}
	}
	slices.SortStableFunc(list, func(a, b *Checkpoint) int { return a.Created.Compare(b.Created) })
	return list, nil
}

// Group returns the checkpoints with the name of a group, by their containers'
// names.
func (s *Store) Group(name string) ([]*Checkpoint, error) {
	list, err := s.List()
	if err != nil {
		return nil, err
	}
	list = slices.DeleteFunc(list, func(c *Checkpoint) bool { return name == "" || c.Group != name })
	slices.SortFunc(list, func(a, b *Checkpoint) int { return strings.Compare(a.ContainerName, b.ContainerName) })
	return list, nil
}

// Remove removes a checkpoint, unless somebody reads it.
func (s *Store) Remove(c *Checkpoint) error {
	l, err := lock(c.Path, unix.LOCK_EX)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return fmt.Errorf("remove checkpoint %s: %w", c.Name, ErrInUse)
	}
	if err != nil {
		return fmt.Errorf("remove checkpoint %s: %w", c.Name, err)
	}
	defer l.Close()
	// In one step, so that there is never half of one.
	hidden, err := os.MkdirTemp(s.dir, oldPrefix)
	if err == nil {
		err = unix.Rename(c.Path, hidden)
	}
	if err == nil {
		err = remove.All(hidden)
	}
	if err != nil {
		return fmt.Errorf("remove checkpoint %s: %w", c.Name, err)
	}
	return syncFile(s.dir)
}

// SetKeep makes prune keep a checkpoint, or not.
func (c *Checkpoint) SetKeep(keep bool) error {
	path := c.File(KeepName)
	if keep {
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return err
		}
		c.Keep = true
		return f.Close()
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	c.Keep = false
	return nil
}

// Check compares the files beside the image set with their digests in the
// record. It tells read how many bytes it has read.
func (c *Checkpoint) Check(ctx context.Context, read func(bytes int64)) error {
	if c.Damage != nil {
		return c.Damage
	}
	for _, want := range c.Files {
		same, err := matches(ctx, c.Path, want)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if errors.Is(err, fs.ErrNotExist) {
			return errcode.Damaged.Errorf("file %s is missing: use another copy of the checkpoint", want.Name)
		}
		if err != nil {
			return err
		}
		read(want.Size)
		if !same {
			return errcode.Damaged.Errorf("file %s is damaged: its digest is not that of %s; use another copy of the checkpoint", want.Name, RecordName)
		}
	}
	return nil
}
