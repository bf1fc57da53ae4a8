// SPDX-License-Identifier: Apache-2.0

// Package guestinitrd puts the guest bundle into an initrd of Kata's. Nothing
// in it is unpacked: the kernel unpacks several archives in one file one over
// the other, and the bundle is one more at its end.
//
// The result is the given initrd, an archive with the bundle, and a small one
// with the [Record], which is never compressed: it is found at the end.
package guestinitrd

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
)

const (
	// Dir is where the guest has the bundle.
	Dir = "/opt/kata-checkpoint/guest"
	// HookPath is the guest_hook_path for such an initrd, with either of Kata's
	// shims.
	HookPath = Dir + "/hooks"
	// Name is the file name of an initrd that is made.
	Name = "guest-initrd.img"

	// recordName is in the guest what [Record] is, beside the bundle.
	recordName = Dir + "/initrd.json"
	// maxRecord is more than the archive with a record takes, in bytes.
	maxRecord = 4096
)

// programs are in every guest bundle.
var programs = []string{
	"bin/kata-checkpoint-agent", "bin/kata-checkpoint-helper", "bin/kata-checkpoint-launcher", "criu/bin/criu", "criu/bin/tar", "criu/bin/gzip",
	"hooks/prestart/kata-checkpoint-agent-hook",
}

// Record says what was appended to an initrd.
type Record struct {
	// Version is the release of the bundle.
	Version string `json:"version"`
	// Base is the size of the initrd before, in bytes.
	Base int64 `json:"base"`
	// Bundle is the SHA-256 of the archive with the bundle, uncompressed.
	Bundle string `json:"bundle"`
}

// ErrNoBundle means that an initrd has no guest bundle.
var ErrNoBundle = errors.New("it has no agent of kata-checkpoint")

// Options describes what is put together.
type Options struct {
	// Base is an initrd of Kata's. One that has a bundle gets the new one in
	// place of it.
	Base string
	// Bundle is the directory of the guest bundle, of the release Version.
	Bundle, Version string
	// Out is the file to make, which replaces another one as a whole.
	Out string
}

// Append makes an initrd with the guest bundle. The same files give the same
// initrd.
func Append(o *Options) (*Record, error) {
	base, err := os.Open(o.Base)
	if err != nil {
		return nil, errcode.InitrdBase.Errorf("the initrd of Kata: %w", err)
	}
	defer base.Close()
	st, err := base.Stat()
	if err != nil {
		return nil, errcode.InitrdBase.Errorf("the initrd of Kata: %w", err)
	}
	compressed, err := sniff(base, o.Base)
	if err != nil {
		return nil, err
	}
	size := st.Size()
	earlier, err := read(base, size)
	switch {
	case err == nil:
		size = earlier.Base
	case !errors.Is(err, ErrNoBundle):
		return nil, errcode.InitrdBase.Errorf("the initrd of Kata, %s: %w", o.Base, err)
	default:
		if out, err := os.Stat(o.Out); err == nil && os.SameFile(st, out) {
			return nil, errcode.InitrdBase.Errorf("%s is Kata's own initrd, which stays as it is: name another file with --out", o.Base)
		}
	}
	archive, err := bundleArchive(o.Bundle)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(archive)
	r := &Record{Version: o.Version, Base: size, Bundle: hex.EncodeToString(sum[:])}
	if compressed {
		if archive, err = compress(archive); err != nil {
			return nil, err
		}
	}
	note, err := r.archive()
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(o.Out), 0o755); err != nil {
		return nil, err
	}
	return r, write(o.Out, io.NewSectionReader(base, 0, size), bytes.NewReader(archive), bytes.NewReader(note))
}

// magics are how an initrd may begin: with a cpio archive of the format newc, or
// compressed with what the kernel can unpack.
var magics = []string{
	"\x1f\x8b", "070701", "070702", "\x28\xb5\x2f\xfd", "\xfd7zXZ", "BZh", "\x5d\x00\x00", "\x02\x21\x4c\x18", "\x89LZO",
}

// sniff reports whether an initrd is compressed with gzip, which the kernel that
// boots it can unpack then. It is an error if the file is no initrd.
func sniff(file io.ReaderAt, path string) (compressed bool, err error) {
	head := make([]byte, 8)
	n, err := file.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return false, errcode.InitrdBase.Errorf("the initrd of Kata: %w", err)
	}
	for i, magic := range magics {
		if strings.HasPrefix(string(head[:n]), magic) {
			return i == 0, nil
		}
	}
	return false, errcode.InitrdBase.Errorf("%s is no initrd: it is neither a cpio archive nor compressed", path)
}

// bundleArchive is the cpio archive with a guest bundle.
func bundleArchive(bundle string) ([]byte, error) {
	dir, err := filepath.EvalSymlinks(bundle)
	if err != nil {
		return nil, errcode.NoGuestBundle.Errorf("there is no guest bundle: %w: install it, or name its directory with --bundle", err)
	}
	for _, name := range programs {
		// kata-agent runs no hook that is a symbolic link.
		st, err := os.Lstat(filepath.Join(dir, name))
		if err == nil && (!st.Mode().IsRegular() || st.Mode()&0o111 == 0) {
			err = fmt.Errorf("%s is not an executable file", st.Name())
		}
		if err != nil {
			return nil, errcode.NoGuestBundle.Errorf("%s is no guest bundle: %w: name its directory with --bundle", bundle, err)
		}
	}
	var c cpio
	for i, r := range Dir {
		if i > 0 && r == '/' {
			c.add(Dir[:i], fs.ModeDir|0o755, nil)
		}
	}
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		st, err := d.Info()
		if err != nil {
			return err
		}
		// Whoever made the bundle: in the guest it belongs to root, and nobody else
		// can write to it.
		mode, data := st.Mode().Type()|0o644, []byte(nil)
		switch {
		case st.IsDir():
			mode |= 0o755
		case st.Mode()&fs.ModeSymlink != 0:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			mode, data = mode|0o777, []byte(target)
		case st.Mode().IsRegular():
			if st.Mode()&0o111 != 0 {
				mode |= 0o755
			}
			if data, err = os.ReadFile(path); err != nil { //nolint:gosec // the operator's bundle
				return err
			}
		default:
			return errcode.NoGuestBundle.Errorf("%s is no guest bundle: %s is neither a file, a directory nor a symbolic link", bundle, path)
		}
		c.add(Dir+strings.TrimPrefix(path, dir), mode, data)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return c.end(), nil
}

func compress(data []byte) ([]byte, error) {
	var b bytes.Buffer
	w, err := gzip.NewWriterLevel(&b, gzip.BestCompression)
	if err != nil {
		return nil, err
	}
	if _, err := w.Write(data); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// archive is a cpio archive with the record, without directories: they are in
// the bundle's.
func (r *Record) archive() ([]byte, error) {
	data, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	var c cpio
	c.add(recordName, 0o644, data)
	return c.end(), nil
}

// Read returns what was appended to the initrd at path, or [ErrNoBundle].
func Read(path string) (*Record, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	st, err := file.Stat()
	if err != nil {
		return nil, err
	}
	return read(file, st.Size())
}

func read(file io.ReaderAt, size int64) (*Record, error) {
	tail := make([]byte, min(size, maxRecord))
	if _, err := file.ReadAt(tail, size-int64(len(tail))); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	i := bytes.LastIndex(tail, []byte(strings.TrimPrefix(recordName, "/")+"\x00"))
	if i < headerSize || !bytes.HasPrefix(tail[i-headerSize:], []byte(newc)) {
		return nil, ErrNoBundle
	}
	var length int
	if _, err := fmt.Sscanf(string(tail[i-headerSize+sizeField:i-headerSize+sizeField+8]), "%08X", &length); err != nil {
		return nil, ErrNoBundle
	}
	begin := i - headerSize + align(headerSize+len(recordName), 4)
	if length < 0 || begin+length > len(tail) {
		return nil, errors.New("the record of the agent in it is cut off")
	}
	var r Record
	if err := json.Unmarshal(tail[begin:begin+length], &r); err != nil || r.Base <= 0 || r.Base > size {
		return nil, fmt.Errorf("the record of the agent in it is damaged: %w", cmp.Or(err, errors.New("no size")))
	}
	return &r, nil
}

// write writes the parts, each at a multiple of the block size.
func write(path string, parts ...io.Reader) error {
	next := path + ".new"
	out, err := os.OpenFile(next, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	for _, part := range parts {
		var n int64
		if n, err = io.Copy(out, part); err != nil {
			break
		}
		if _, err = out.Write(make([]byte, align(int(n), blockSize)-int(n))); err != nil {
			break
		}
	}
	if err == nil {
		err = out.Sync()
	}
	if closed := out.Close(); err == nil {
		err = closed
	}
	if err != nil {
		_ = os.Remove(next)
		return err
	}
	return os.Rename(next, path)
}
