// SPDX-License-Identifier: Apache-2.0

// Package export turns checkpoints of the store into archives, and archives
// into checkpoints of the store.
//
// The layout is that of the CRI's archives, so that checkpointctl, CRI-O,
// podman and containerd know what they have: a tar with config.dump, spec.dump,
// status.dump, rootfs-diff.tar and the image set in checkpoint/. It is
// compressed with zstd or gzip, or not, and then encrypted with age, if
// recipients are given.
//
// An archive may be anybody's. What is read is bounded, names are those that
// are expected, and the image set is verified before it gets its name in the
// store.
package export

import (
	"archive/tar"
	"bufio"

	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"filippo.io/age"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"github.com/kata-checkpoint/kata-checkpoint/internal/archive"
	"github.com/kata-checkpoint/kata-checkpoint/internal/budget"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
	"github.com/kata-checkpoint/kata-checkpoint/internal/store"
	"github.com/kata-checkpoint/kata-checkpoint/internal/text"
)

// Compression is how an archive is compressed.
type Compression string

// Compressions.
const (
	Zstd Compression = "zstd"
	Gzip Compression = "gzip"
	None Compression = "none"
)

// ageMagic begins what age has encrypted.
const ageMagic = "age-encryption.org/"

// maxExtra bounds a file beside the image set, the changes of the root file
// system excepted, in bytes.
const maxExtra = 64 << 20

// Write writes a checkpoint as an archive. It tells read how many bytes it has
// read, and fails if the checkpoint is damaged.
func Write(ctx context.Context, w io.Writer, c *store.Checkpoint, compression Compression, recipients []age.Recipient, read func(int64)) (err error) {
	set, err := imageset.Open(c.Images())
	if err != nil {
		return err
	}
	defer set.Close()
	closers := []io.Closer{}
	defer func() {
		if err != nil {
			return
		}
		for _, c := range slices.Backward(closers) {
			err = errclass.Join(err, c.Close())
		}
	}()
	if len(recipients) > 0 {
		encrypted, err := age.Encrypt(w, recipients...)
		if err != nil {
			return err
		}
		closers = append(closers, encrypted)
		w = encrypted
	}
	switch compression {
	case Zstd:
		z, err := zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.SpeedFastest))
		if err != nil {
			return err
		}
		closers = append(closers, z)
		w = z
	case Gzip:
		z, err := gzip.NewWriterLevel(w, gzip.BestSpeed)
		if err != nil {
			return err
		}
		closers = append(closers, z)
		w = z
	case None:
	default:
		return errcode.Usage.Errorf("unknown compression %q: use zstd, gzip or none", compression)
	}
	t := tar.NewWriter(w)
	closers = append(closers, t)
	return write(ctx, t, c, set, read)
}

func write(ctx context.Context, t *tar.Writer, c *store.Checkpoint, set *imageset.Set, read func(int64)) error {
	header := func(name string, size int64) *tar.Header {
		return &tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o600, ModTime: c.Created.Truncate(time.Second)}
	}
	dir := header(imageset.ArchiveImages+"/", 0)
	dir.Typeflag, dir.Mode = tar.TypeDir, 0o700
	if err := t.WriteHeader(dir); err != nil {
		return err
	}
	// The manifest comes first: whoever restores decides by it.
	for _, name := range []string{imageset.ManifestName, imageset.SignatureName} {
		if name == imageset.SignatureName && !set.Signed() {
			continue
		}
		data, err := set.ReadFile(name, maxExtra)
		if err != nil {
			return err
		}
		if err := t.WriteHeader(header(path.Join(imageset.ArchiveImages, name), int64(len(data)))); err != nil {
			return err
		}
		if _, err := t.Write(data); err != nil {
			return err
		}
	}
	if err := c.Check(ctx, func(int64) {}); err != nil {
		return err
	}
	for _, name := range append([]string{store.RecordName}, store.Extras...) {
		if err := addFile(ctx, t, c.File(name), func(size int64) *tar.Header { return header(name, size) }, read); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	for _, f := range set.Manifest.Files {
		if err := t.WriteHeader(header(path.Join(imageset.ArchiveImages, f.Name), f.Size)); err != nil {
			return err
		}
		if err := set.WriteTo(ctx, f, io.MultiWriter(t, counted(read))); err != nil {
			return err
		}
	}
	return nil
}

func addFile(ctx context.Context, t *tar.Writer, path string, header func(int64) *tar.Header, read func(int64)) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if err := t.WriteHeader(header(st.Size())); err != nil {
		return err
	}
	_, err = io.Copy(io.MultiWriter(t, counted(read)), budget.Reader(ctx, f))
	return err
}

type counted func(int64)

// Write implements [io.Writer].
func (c counted) Write(p []byte) (int, error) {
	c(int64(len(p)))
	return len(p), nil
}

// ErrEncrypted is the error about an encrypted archive without an identity.
var ErrEncrypted = errcode.Encrypted.Wrap(errors.New("it is encrypted: give the file with your age identity (--identity)"))

// Read reads an archive into a draft, and verifies the image set. It tells read
// how many bytes of the archive it has read. The caller commits the record.
func Read(ctx context.Context, r io.Reader, draft *store.Draft, identities []age.Identity, limits imageset.Limits, read func(int64)) (*store.Record, *imageset.Manifest, error) {
	stream, err := open(ctx, io.TeeReader(r, counted(read)), identities)
	if err != nil {
		return nil, nil, err
	}
	defer stream.Close()
	top, err := os.Open(draft.Path())
	if err != nil {
		return nil, nil, err
	}
	defer top.Close()
	x := &reader{draft: draft, left: limits, room: budget.NewRoom(top, limits.Reserve)}
	if err := x.read(ctx, tar.NewReader(stream)); err != nil {
		return nil, nil, err
	}
	set, err := imageset.Open(draft.Images())
	if err != nil {
		return nil, nil, err
	}
	defer set.Close()
	if err := set.CheckFiles(ctx, func(int64) {}); err != nil {
		return nil, nil, err
	}
	rec, err := record(draft, set.Manifest)
	return rec, set.Manifest, err
}

// open decrypts and decompresses.
func open(ctx context.Context, r io.Reader, identities []age.Identity) (io.ReadCloser, error) {
	peeked := bufio.NewReaderSize(r, 1<<20)
	head, err := peeked.Peek(len(ageMagic))
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	var plain io.Reader = peeked
	if string(head) == ageMagic {
		if len(identities) == 0 {
			return nil, ErrEncrypted
		}
		if plain, err = age.Decrypt(peeked, identities...); err != nil {
			if mismatch := new(age.NoIdentityMatchError); errors.As(err, &mismatch) {
				return nil, errcode.Encrypted.Wrap(errors.New("it is encrypted for others: none of your identities can open it"))
			}
			return nil, err
		}
	}
	return archive.Decompress(ctx, plain)
}

type reader struct {
	draft *store.Draft
	left  imageset.Limits
	room  *budget.Room
}

func (x *reader) read(ctx context.Context, t *tar.Reader) error {
	images := 0
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return errcode.BadArchive.Errorf("it is not a checkpoint archive, or cut short: %w", err)
		}
		name := strings.TrimPrefix(h.Name, "./")
		image, isImage := strings.CutPrefix(name, imageset.ArchiveImages+"/")
		switch {
		case isImage && image == "", h.Typeflag == tar.TypeDir:
			continue
		case isImage:
			if image != imageset.ManifestName && image != imageset.SignatureName && !imageset.IsImage(image) {
				return fmt.Errorf("%q cannot be in a checkpoint", text.Line(h.Name, text.MaxName))
			}
			images++
		case name == store.RecordName, slices.Contains(store.Extras, name):
			if name != imageset.RootfsDiffName && h.Size > maxExtra {
				return fmt.Errorf("%s has %d bytes, more than %d", name, h.Size, maxExtra)
			}
		default:
			continue // what engines put beside it
		}
		if h.Typeflag != tar.TypeReg {
			return fmt.Errorf("%q is not a regular file", text.Line(h.Name, text.MaxName))
		}
		if err := x.write(ctx, h, t, name); err != nil {
			return err
		}
	}
	if images == 0 {
		return errcode.BadArchive.Errorf("it has no files in %s/: it is not a checkpoint archive", imageset.ArchiveImages)
	}
	return nil
}

func (x *reader) write(ctx context.Context, h *tar.Header, r io.Reader, name string) (err error) {
	if err := x.left.Take(h.Size); err != nil {
		return err
	}
	if err := x.room.Check(0); err != nil {
		return err
	}
	// O_EXCL refuses a name that is there twice.
	f, err := os.OpenFile(x.draft.File(name), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errclass.Join(err, f.Close()) }()
	sparse := budget.NewSparseWriter(f, x.room)
	if _, err := io.CopyBuffer(sparse, budget.Reader(ctx, r), make([]byte, 1<<20)); err != nil {
		return errcode.BadArchive.Errorf("it is cut short or damaged: %w", err)
	}
	if err := sparse.Finish(); err != nil {
		return err
	}
	return f.Sync()
}

// record is the record for an archive: what its own says, or the CRI's files
// and the manifest where it has none. What the manifest knows is the
// manifest's, which is signed.
func record(draft *store.Draft, m *imageset.Manifest) (*store.Record, error) {
	r := &store.Record{}
	f, err := os.Open(draft.File(store.RecordName))
	switch {
	case err == nil:
		r, err = store.ParseRecord(f)
		f.Close()
		if err != nil {
			return nil, fmt.Errorf("%s is damaged: %w", store.RecordName, err)
		}
		if err := checkFiles(draft, r); err != nil {
			return nil, err
		}
	case !errors.Is(err, os.ErrNotExist):
		return nil, err
	default:
		fromDumps(draft, r)
	}
	r.Container, r.Namespace, r.Created = m.Container.ID, m.Container.Namespace, m.Created
	if m.Container.Image != "" {
		r.Image = m.Container.Image
	}
	if m.Container.PodNamespace != "" && r.Pod == nil {
		r.Pod = &store.Pod{}
	}
	if r.Pod != nil {
		r.Pod.Namespace = m.Container.PodNamespace
	}
	for _, s := range []*string{&r.Group, &r.Engine, &r.Namespace, &r.Container, &r.ContainerName, &r.Image, &r.Runtime} {
		*s = text.Line(*s, text.MaxName)
	}
	if store.CheckName(r.Group) != nil {
		r.Group = ""
	}
	return r, nil
}
