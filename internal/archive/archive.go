// SPDX-License-Identifier: Apache-2.0

// Package archive extracts what a restore needs from a checkpoint archive of
// containerd's CRI: the image set and the changes of the root file system. It
// ignores everything else: what a container is and may do is decided by whoever
// creates it, never by an archive.
//
// The shim (package plugin/internal/task) uses it for pods that name an
// archive. That an image set comes from an archive lends it no trust: package
// imageset verifies it.
//
// Written against containerd 2.4
// (internal/cri/server/container_checkpoint_linux.go).
package archive

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/budget"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
	"github.com/kata-checkpoint/kata-checkpoint/internal/regular"
)

// Extract writes the image set and the root file system diff of the archive
// name in dir to target, a directory that only this user can reach. The archive
// may be compressed.
//
// It returns an error that wraps [fs.ErrNotExist] where there is no such
// archive. The caller removes what was written before an error.
func Extract(ctx context.Context, dir, name, target string, limits imageset.Limits) error {
	f, err := open(dir, name)
	if err != nil {
		return err
	}
	defer f.Close()
	stream, err := Decompress(ctx, f)
	if err != nil {
		return errcode.BadArchive.Errorf("archive %s: %w", name, err)
	}
	defer stream.Close()
	top, err := os.Open(target)
	if err != nil {
		return fmt.Errorf("archive %s: %w", name, err)
	}
	defer top.Close()
	if err := os.Mkdir(filepath.Join(target, imageset.ArchiveImages), 0o700); err != nil {
		return fmt.Errorf("archive %s: %w", name, err)
	}
	x := &extractor{target: target, left: limits, room: budget.NewRoom(top, limits.Reserve), buffer: make([]byte, copyBuffer)}
	if err := x.extract(ctx, tar.NewReader(stream)); err != nil {
		return fmt.Errorf("archive %s: %w", name, err)
	}
	if x.images == 0 {
		return errcode.BadArchive.Errorf("archive %s: no files in %s/: it is not a checkpoint archive", name, imageset.ArchiveImages)
	}
	return nil
}

// Manifest reads the manifest of the image set in an archive, and no more of the
// archive than it takes to find it.
func Manifest(ctx context.Context, dir, name string) (*imageset.Manifest, error) {
	f, err := open(dir, name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	m, err := findManifest(ctx, f)
	if err != nil {
		return nil, fmt.Errorf("archive %s: %w", name, err)
	}
	return m, nil
}

func findManifest(ctx context.Context, f *os.File) (*imageset.Manifest, error) {
	var r io.Reader = f // in which what is not read can be skipped
	magic := make([]byte, magicBytes)
	n, err := f.ReadAt(magic, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	if compression.DetectCompression(magic[:n]) != compression.Uncompressed {
		stream, err := Decompress(ctx, f)
		if err != nil {
			return nil, err
		}
		defer stream.Close()
		r = stream
	}
	for entries := tar.NewReader(r); ; {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		header, err := entries.Next()
		if errors.Is(err, io.EOF) {
			return nil, errcode.BadArchive.Errorf("no %s/%s: it is no checkpoint archive of kata-checkpoint", imageset.ArchiveImages, imageset.ManifestName)
		}
		if err != nil {
			return nil, err
		}
		if strings.TrimPrefix(header.Name, "./") == path.Join(imageset.ArchiveImages, imageset.ManifestName) {
			return imageset.ReadManifest(entries)
		}
	}
}

// ErrName is wrapped by the error about a name that no archive can have.
var ErrName = errcode.NoArchive.Wrap(errors.New("not the name of an archive"))

// open opens a regular file that is in dir itself.
func open(dir, name string) (*os.File, error) {
	if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") {
		return nil, fmt.Errorf("%q is %w: give the name of a file in %s", name, ErrName, dir)
	}
	top, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(top)
	f, _, err := regular.Open(top, name, unix.RESOLVE_BENEATH|unix.RESOLVE_NO_SYMLINKS)
	if err != nil {
		return nil, fmt.Errorf("in %s: %w", dir, err)
	}
	return f, nil
}

type extractor struct {
	target string
	left   imageset.Limits
	room   *budget.Room
	images int
	buffer []byte
}

// copyBuffer is the size of a read in bytes.
const copyBuffer = 1 << 20

func (x *extractor) extract(ctx context.Context, r *tar.Reader) error {
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		header, err := r.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			return errcode.BadArchive.Wrap(err)
		}
		name := strings.TrimPrefix(header.Name, "./")
		inside, isImage := strings.CutPrefix(name, imageset.ArchiveImages+"/")
		switch {
		case name == imageset.RootfsDiffName:
			err = x.write(ctx, header, r, name)
		case !isImage, inside == "":
			continue
		case inside == ".", inside == "..", strings.Contains(inside, "/"):
			err = errcode.BadArchive.Errorf("%q is in a subdirectory, which an image set cannot have", header.Name)
		default:
			x.images++
			err = x.write(ctx, header, r, path.Join(imageset.ArchiveImages, inside))
		}
		if err != nil {
			return err
		}
	}
}

func (x *extractor) write(ctx context.Context, header *tar.Header, r io.Reader, name string) (err error) {
	if header.Typeflag != tar.TypeReg {
		return errcode.BadArchive.Errorf("%q is not a regular file", header.Name)
	}
	if err := x.left.Take(header.Size); err != nil {
		return err
	}
	if err := x.room.Check(0); err != nil {
		return err
	}
	// O_EXCL rejects duplicate names.
	f, err := os.OpenFile(filepath.Join(x.target, name), os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errclass.Join(err, f.Close()) }()
	// A sparse entry may be mostly holes.
	sparse := budget.NewSparseWriter(f, x.room)
	if _, err := io.CopyBuffer(sparse, budget.Reader(ctx, r), x.buffer); err != nil {
		return err
	}
	return sparse.Finish()
}
