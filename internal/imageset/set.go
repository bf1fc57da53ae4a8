// SPDX-License-Identifier: Apache-2.0

package imageset

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/budget"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/signing"
)

// Set is an image set to restore from.
type Set struct {
	Manifest *Manifest
	dir      *os.File
	// raw is the manifest as it is in the file.
	raw []byte
	// signature of the manifest, nil if there is none.
	signature []byte
}

// Open reads an image set's manifest and checks that the directory has exactly
// the files that it lists, with their sizes. [Set.CopyTo] checks the digests.
// The caller closes the set.
func Open(path string) (*Set, error) {
	dir, err := openDir(path)
	if err != nil {
		return nil, fmt.Errorf("checkpoint directory: %w", err)
	}
	s := &Set{dir: dir}
	if err := s.check(); err != nil {
		dir.Close()
		return nil, fmt.Errorf("checkpoint %s: %w", path, err)
	}
	return s, nil
}

// Close releases the directory.
func (s *Set) Close() error { return s.dir.Close() }

func (s *Set) check() error {
	f, _, err := openRegular(s.dir, ManifestName)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: it has no %s; was it made by another runtime, or not finished?", ErrNotImageSet, ManifestName)
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if s.raw, err = io.ReadAll(io.LimitReader(f, maxManifest+1)); err != nil {
		return err
	}
	if s.Manifest, err = parseManifest(s.raw); err != nil {
		return err
	}
	if s.signature, err = s.readSignature(); err != nil {
		return err
	}
	// A few more than there should be, so that the error can name one.
	names, err := list(s.dir, len(s.Manifest.Files)+2+64)
	if err != nil {
		return errcode.Unlisted.Errorf("it has files that its manifest does not list: %w", err)
	}
	present := make(map[string]bool, len(names))
	for _, n := range names {
		// The directory from which the files came stays behind if the host stops
		// before it is removed.
		present[n] = !isStagingName(n)
	}
	maps.DeleteFunc(present, func(_ string, counts bool) bool { return !counts })
	delete(present, ManifestName)
	if s.Manifest.FormatVersion >= signedSince {
		delete(present, SignatureName)
	}
	for _, want := range s.Manifest.Files {
		if !present[want.Name] {
			return errcode.Damaged.Errorf("file %s is missing: use another copy of the checkpoint", want.Name)
		}
		delete(present, want.Name)
		var st unix.Stat_t
		if err := unix.Fstatat(int(s.dir.Fd()), want.Name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return &os.PathError{Op: "stat", Path: want.Name, Err: err}
		}
		if st.Mode&unix.S_IFMT != unix.S_IFREG {
			return errcode.Damaged.Errorf("%s is not a regular file", want.Name)
		}
		if st.Size != want.Size {
			return errcode.Damaged.Errorf("file %s has %d bytes and should have %d: use another copy of the checkpoint", want.Name, st.Size, want.Size)
		}
	}
	if more := slices.Sorted(maps.Keys(present)); len(more) > 0 {
		return errcode.Unlisted.Errorf("%q is not listed in %s: restore from a directory with nothing but the checkpoint", more[0], ManifestName)
	}
	return nil
}

// signedSince is the first format version with signatures.
const signedSince = 2

func (s *Set) readSignature() ([]byte, error) {
	if s.Manifest.FormatVersion < signedSince {
		return nil, nil
	}
	f, _, err := openRegular(s.dir, SignatureName)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, ed25519.SignatureSize+1))
}

// Errors of [Set.Verify].
var (
	ErrUnsigned  = errcode.Unsigned.Wrap(errors.New("it is not signed"))
	ErrUntrusted = errcode.Unsigned.Wrap(errors.New("is not trusted on this node"))
	ErrForged    = errcode.Forged.Wrap(errors.New("its signature is not that of its manifest: use another copy of the checkpoint"))
)

// Verify checks that one of the keys has signed the manifest, and with it the
// digests of all files.
func (s *Set) Verify(keys []ed25519.PublicKey) error {
	if s.signature == nil {
		return ErrUnsigned
	}
	if signing.Verify(keys, s.raw, s.signature) {
		return nil
	}
	for _, k := range keys {
		if signing.Fingerprint(k) == s.Manifest.SignedBy {
			return ErrForged
		}
	}
	return fmt.Errorf("the key that signed it, %s, %w", s.Manifest.SignedBy, ErrUntrusted)
}

// CopyTo copies the images, without the manifest, into a new directory and
// verifies their digests on the way, within the limits. It removes the
// directory after an error.
func (s *Set) CopyTo(ctx context.Context, path string, limits Limits) (err error) {
	for _, f := range s.Manifest.Files {
		if err := limits.Take(f.Size); err != nil {
			return fmt.Errorf("stage checkpoint: %w", err)
		}
	}
	if err := os.Mkdir(path, 0o700); err != nil {
		return fmt.Errorf("stage checkpoint: %w", err)
	}
	defer func() {
		if err != nil {
			err = errclass.Join(err, os.RemoveAll(path))
		}
	}()
	dst, err := openDir(path)
	if err != nil {
		return fmt.Errorf("stage checkpoint: %w", err)
	}
	defer dst.Close()
	room := budget.NewRoom(dst, limits.Reserve)
	for _, want := range s.Manifest.Files {
		if err := s.copyOne(ctx, want, dst, room); err != nil {
			return s.explainFull(err)
		}
	}
	return nil
}

// explainFull adds how much the set takes.
func (s *Set) explainFull(err error) error {
	if !errors.As(err, new(*budget.FullError)) {
		return err
	}
	return fmt.Errorf("the checkpoint has %s: %w", budget.Size(s.Manifest.Bytes()), err)
}

// MoveTo is [Set.CopyTo] for a set that nobody else has or needs, to a directory
// on the same file system, of which it takes no more space. The set is not one
// afterwards, nor after an error.
func (s *Set) MoveTo(ctx context.Context, path string) (err error) {
	if err := os.Mkdir(path, 0o700); err != nil {
		return fmt.Errorf("stage checkpoint: %w", err)
	}
	defer func() {
		if err != nil {
			err = errclass.Join(err, os.RemoveAll(path))
		}
	}()
	dst, err := openDir(path)
	if err != nil {
		return fmt.Errorf("stage checkpoint: %w", err)
	}
	defer dst.Close()
	for _, want := range s.Manifest.Files {
		if err := s.moveOne(ctx, want, dst); err != nil {
			return err
		}
	}
	return nil
}

// CopyWhole is CopyTo with the manifest and its signature, for another reader
// of image sets.
func (s *Set) CopyWhole(ctx context.Context, path string, limits Limits) error {
	if err := s.CopyTo(ctx, path, limits); err != nil {
		return err
	}
	err := os.WriteFile(filepath.Join(path, ManifestName), s.raw, 0o600)
	if err == nil && s.signature != nil {
		err = os.WriteFile(filepath.Join(path, SignatureName), s.signature, 0o600)
	}
	if err != nil {
		return errclass.Join(fmt.Errorf("copy checkpoint: %w", err), os.RemoveAll(path))
	}
	return nil
}

func (s *Set) moveOne(ctx context.Context, want File, dst *os.File) error {
	f, st, err := openRegular(s.dir, want.Name)
	if err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	defer f.Close()
	_, sum, err := copyContext(ctx, io.Discard, io.LimitReader(f, st.Size), min(copyBuffer, st.Size+1), want.hash())
	if err != nil {
		return fmt.Errorf("stage checkpoint: %w", err)
	}
	if err := checkSum(want, sum); err != nil {
		return err
	}
	if err := unix.Renameat2(int(s.dir.Fd()), want.Name, int(dst.Fd()), want.Name, unix.RENAME_NOREPLACE); err != nil {
		return fmt.Errorf("stage checkpoint: %w", &os.PathError{Op: "move", Path: want.Name, Err: err})
	}
	return nil
}

func checkSum(want File, sum string) error {
	if !want.has(sum) {
		return fmt.Errorf("checkpoint: file %s is damaged: its digest is not that of the manifest; use another copy of the checkpoint", want.Name)
	}
	return nil
}

func (s *Set) copyOne(ctx context.Context, want File, dst *os.File, room *budget.Room) error {
	f, st, err := openRegular(s.dir, want.Name)
	if err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	defer f.Close()
	if st.Size != want.Size {
		return errcode.Damaged.Errorf("checkpoint: file %s changed its size while it was read", want.Name)
	}
	sum, err := copyFile(ctx, f, st.Size, dst, want.Name, room, want.hash())
	if err != nil {
		return fmt.Errorf("stage checkpoint: %w", err)
	}
	return checkSum(want, sum)
}

// CheckFiles reads all files and compares their digests with those of the
// manifest, without copying anything. It tells read how many bytes it has read.
// Its error names every file that is damaged.
func (s *Set) CheckFiles(ctx context.Context, read func(bytes int64)) error {
	var damaged []string
	for _, want := range s.Manifest.Files {
		sum, err := s.digest(ctx, want, read)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		switch {
		case err != nil:
			damaged = append(damaged, fmt.Sprintf("%s (%v)", want.Name, err))
		case !want.has(sum):
			damaged = append(damaged, want.Name)
		}
	}
	switch len(damaged) {
	case 0:
		return nil
	case 1:
		return fmt.Errorf("file %s is damaged: its digest is not that of the manifest; use another copy of the checkpoint", damaged[0])
	}
	return fmt.Errorf("the files %s are damaged: their digests are not those of the manifest; use another copy of the checkpoint", strings.Join(damaged, ", "))
}

func (s *Set) digest(ctx context.Context, want File, read func(int64)) (string, error) {
	f, st, err := openRegular(s.dir, want.Name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	if st.Size != want.Size {
		return "", errors.New("it changed its size while it was read")
	}
	_, sum, err := copyContext(ctx, told(read), io.LimitReader(f, want.Size+1), min(copyBuffer, want.Size+1), want.hash())
	return sum, err
}

// WriteTo writes one of the set's files to w. It fails at its end if the file
// is damaged.
func (s *Set) WriteTo(ctx context.Context, want File, w io.Writer) error {
	f, st, err := openRegular(s.dir, want.Name)
	if err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	defer f.Close()
	if st.Size != want.Size {
		return fmt.Errorf("checkpoint: file %s changed its size while it was read", want.Name)
	}
	_, sum, err := copyContext(ctx, w, io.LimitReader(f, want.Size), min(copyBuffer, want.Size+1), want.hash())
	if err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	if !want.has(sum) {
		return errcode.Damaged.Errorf("checkpoint: file %s is damaged: its digest is not that of the manifest; use another copy of the checkpoint", want.Name)
	}
	return nil
}

// told is a writer that only counts.
type told func(bytes int64)

// Write implements [io.Writer].
func (t told) Write(p []byte) (int, error) {
	t(int64(len(p)))
	return len(p), nil
}

// ReadFile reads one of the set's files, the manifest and its signature
// included, if it has at most limit bytes.
func (s *Set) ReadFile(name string, limit int64) ([]byte, error) {
	f, st, err := openRegular(s.dir, name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if st.Size > limit {
		return nil, fmt.Errorf("%s has %d bytes, more than %d", name, st.Size, limit)
	}
	return io.ReadAll(io.LimitReader(f, limit))
}

// Signed reports whether the set has a signature, whoever made it.
func (s *Set) Signed() bool { return s.signature != nil }
