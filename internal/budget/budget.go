// SPDX-License-Identifier: Apache-2.0

// Package budget bounds what the host takes from a source that it does not
// trust, a guest or an archive: files, bytes, the blocks that they occupy, how
// much a compressed stream expands, and the time. All that is unpacked, copied
// or followed goes through it (packages imageset and internal/archive,
// and the root file system diff of plugin/internal/task).
package budget

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
)

// Limits bound one operation.
type Limits struct {
	// Files is the maximum number of files.
	Files int
	// Bytes is the maximum of their sizes together. Holes count.
	Bytes int64
	// Reserve is how many bytes stay free on the file system that is written to,
	// see [Room].
	Reserve int64
}

// ErrExceeded is wrapped by the errors about a limit.
var ErrExceeded = errcode.TooLarge.Wrap(errors.New("larger than allowed"))

// Take subtracts a file of size bytes from what is left.
func (l *Limits) Take(size int64) error {
	if l.Files--; l.Files < 0 {
		return fmt.Errorf("there are more files, and it is %w: raise max_image_files in config.toml", ErrExceeded)
	}
	if size < 0 || size > l.Bytes {
		return fmt.Errorf("the image set is %w: raise max_image_bytes in config.toml", ErrExceeded)
	}
	l.Bytes -= size
	return nil
}

// grant is the number of bytes that may be written until the next look at the
// file system.
const grant = 16 << 20

// reserveShare: of a small file system no more than one part in so many is kept
// free.
const reserveShare = 20

// Room is the file system that something is written to. It keeps a part of it
// free for others: a node whose disk is full loses more than a checkpoint.
type Room struct {
	dir     *os.File
	reserve int64
	granted int64
}

// NewRoom returns the room in a directory. Of a file system of less than twenty
// times the reserve, a twentieth is kept free.
func NewRoom(dir *os.File, reserve int64) *Room { return &Room{dir: dir, reserve: reserve} }

// Take is called before n bytes are written. Its error wraps [unix.ENOSPC].
func (r *Room) Take(n int64) error {
	if r.granted >= n {
		r.granted -= n
		return nil
	}
	if err := r.Check(n + grant); err == nil {
		r.granted = grant
		return nil
	}
	r.granted = 0
	return r.Check(n)
}

// Check reports whether n more bytes, and a file, have room.
func (r *Room) Check(n int64) error {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(r.dir.Fd()), &st); err != nil {
		return &os.PathError{Op: "statfs", Path: r.dir.Name(), Err: err}
	}
	size, free := int64(st.Blocks)*st.Frsize, int64(st.Bavail)*st.Frsize //nolint:gosec // the kernel's own
	keep := min(r.reserve, size/reserveShare)
	if size > 0 && free-n < keep { // some file systems have no size
		return &FullError{Path: r.dir.Name(), Free: free, Keep: keep}
	}
	if keep > 0 && st.Files > 0 && st.Ffree < min(st.Files/reserveShare, reserveFiles) {
		return &FullError{Path: r.dir.Name(), Files: true}
	}
	return nil
}

// reserveFiles is how many inodes stay free, where the file system has a fixed
// number of them.
const reserveFiles = 4096

// FullError is the error about a file system without room.
type FullError struct {
	Path string
	// Free and Keep are what is free and what has to stay free, in bytes.
	Free, Keep int64
	// Files: it is short of inodes.
	Files bool
}

// Error implements error.
func (e *FullError) Error() string {
	if e.Files {
		return fmt.Sprintf("the file system of %s is short of inodes: remove files", e.Path)
	}
	return fmt.Sprintf("the file system of %s has %s left, of which %s stay free (reserve_bytes in config.toml): free some space", e.Path, Size(e.Free), Size(e.Keep))
}

// Size is a number of bytes in words.
func Size(bytes int64) string {
	if bytes < 10<<20 {
		return fmt.Sprintf("%d KiB", bytes>>10)
	}
	return fmt.Sprintf("%d MiB", bytes>>20)
}

// Unwrap lets it be taken for what the file system itself would say.
func (e *FullError) Unwrap() error { return unix.ENOSPC }

// Reader returns a reader that fails once ctx is done, also where many reads
// happen in one call, as when an entry of an archive is skipped.
func Reader(ctx context.Context, r io.Reader) io.Reader { return &reader{ctx: ctx, r: r} }

type reader struct {
	ctx context.Context
	r   io.Reader
}

func (r *reader) Read(p []byte) (int, error) {
	if r.ctx.Err() != nil {
		return 0, context.Cause(r.ctx)
	}
	return r.r.Read(p)
}

const (
	// maxRatio bounds how much a compressed stream expands, beyond freeExpansion
	// bytes. Memory seldom shrinks to a tenth.
	maxRatio      = 1000
	freeExpansion = 1 << 30
)

// Expansion bounds the ratio of two readers: what a decompressor reads from In
// and what is read from it through Out.
type Expansion struct{ in, out int64 }

// In returns a reader of the compressed stream.
func (e *Expansion) In(r io.Reader) io.Reader {
	return &counter{r: r, count: func(n int64) error { e.in += n; return nil }}
}

// Out returns a reader of what it expands to, on the same goroutine.
func (e *Expansion) Out(r io.Reader) io.Reader {
	return &counter{r: r, count: func(n int64) error {
		if e.out += n; e.out > freeExpansion+maxRatio*e.in {
			return fmt.Errorf("it expands to more than %d times its size, which is %w: decompress it yourself if you trust it", maxRatio, ErrExceeded)
		}
		return nil
	}}
}

type counter struct {
	r     io.Reader
	count func(int64) error
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	if cerr := c.count(int64(n)); cerr != nil {
		return 0, cerr
	}
	return n, err
}

// hole is the size and alignment of what becomes a hole if it is zero.
const hole = 64 << 10

var zeros [hole]byte

// SparseWriter writes a new file, leaves out blocks of zeros, and takes the rest
// from a room: a file of zeros, or of holes, needs no blocks.
type SparseWriter struct {
	f    *os.File
	room *Room
	size int64
}

// NewSparseWriter writes to an empty file.
func NewSparseWriter(f *os.File, room *Room) *SparseWriter { return &SparseWriter{f: f, room: room} }

// Write implements [io.Writer].
func (w *SparseWriter) Write(p []byte) (int, error) {
	done := 0 // of p, written or left out
	for at := 0; at <= len(p); {
		end := min(len(p), at+int(hole-(w.size+int64(at))%hole))
		isHole := end > at && isZero(p[at:end])
		if (isHole || end == at) && at > done {
			if err := w.write(p[done:at], int64(done)); err != nil {
				return done, err
			}
			done = at
		}
		if end == at {
			break
		}
		if isHole {
			done = end
		}
		at = end
	}
	w.size += int64(len(p))
	return len(p), nil
}

func (w *SparseWriter) write(p []byte, offset int64) error {
	if err := w.room.Take(int64(len(p))); err != nil {
		return err
	}
	_, err := w.f.WriteAt(p, w.size+offset)
	return err
}

// Finish gives the file its size. It does not close it.
func (w *SparseWriter) Finish() error { return w.f.Truncate(w.size) }

func isZero(p []byte) bool { return string(p) == string(zeros[:len(p)]) }
