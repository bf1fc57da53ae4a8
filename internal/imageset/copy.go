// SPDX-License-Identifier: Apache-2.0

package imageset

import (
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/budget"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
)

func isEOF(err error) bool { return errors.Is(err, io.EOF) }

// copyBuffer is the size of a read in bytes: large enough to make the cost of
// system calls negligible beside that of the digest. The digest of one buffer
// is computed while the next ones are read and written, because the container
// is frozen meanwhile.
const (
	copyBuffer  = 1 << 20
	copyBuffers = 4
)

// copyFile copies size bytes of src to a new file in dst and returns the digest,
// by h, of what it wrote. The two share their blocks where the file system supports
// that; otherwise the copy has holes where there are zeros, and the rest is
// taken from room, which is that of dst. A source that grows or shrinks meanwhile
// is an error.
func copyFile(ctx context.Context, src *os.File, size int64, dst *os.File, name string, room *budget.Room, h hash.Hash) (sum string, err error) {
	out, err := create(dst, name)
	if err != nil {
		return "", err
	}
	defer func() { err = errclass.Join(err, out.Close()) }()

	// After a clone, the digest is that of the copy, which nobody else can write.
	sparse := budget.NewSparseWriter(out, room)
	from, to := src, io.Writer(&early{Writer: sparse, f: out})
	if unix.IoctlFileClone(int(out.Fd()), int(src.Fd())) == nil {
		from, to = out, io.Discard
	}
	n, sum, err := copyContext(ctx, to, io.LimitReader(from, size+1), min(copyBuffer, size+1), h)
	switch {
	case err != nil:
		return "", fmt.Errorf("copy %s to %s: %w", name, dst.Name(), err)
	case n != size:
		return "", fmt.Errorf("%s changed its size while it was copied", name)
	case from == src:
		if err := sparse.Finish(); err != nil {
			return "", fmt.Errorf("copy %s to %s: %w", name, dst.Name(), err)
		}
	}
	return sum, nil
}

// early writes to a file whose content the kernel begins to write to the disk at
// once, so that less of it is left when the caller waits for all.
type early struct {
	io.Writer
	f  *os.File
	at int64
}

// Write implements io.Writer.
func (w *early) Write(p []byte) (int, error) {
	n, err := w.Writer.Write(p)
	writeOut(w.f, w.at, int64(n))
	w.at += int64(n)
	return n, err
}

// create makes a new file in dir.
func create(dir *os.File, name string) (*os.File, error) {
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, &os.PathError{Op: "create", Path: dir.Name() + "/" + name, Err: err}
	}
	return os.NewFile(uintptr(fd), dir.Name()+"/"+name), nil
}

// copyContext copies r to its end in reads of at most buffer bytes, and returns
// the number of bytes and their digest by h.
func copyContext(ctx context.Context, w io.Writer, r io.Reader, buffer int64, h hash.Hash) (total int64, sum string, err error) {
	free := make(chan []byte, copyBuffers)
	for range copyBuffers {
		free <- make([]byte, buffer)
	}
	written := make(chan []byte, copyBuffers)
	digest := make(chan string, 1)
	go func() {
		for b := range written {
			h.Write(b) // never fails (package hash)
			free <- b[:buffer]
		}
		digest <- hexSum(h)
	}()
	defer func() {
		close(written)
		sum = <-digest
	}()
	for {
		if ctx.Err() != nil {
			return total, "", context.Cause(ctx)
		}
		buf := <-free
		n, err := r.Read(buf)
		if n > 0 {
			if _, err := w.Write(buf[:n]); err != nil {
				return total, "", err
			}
			total += int64(n)
			written <- buf[:n]
		}
		switch {
		case isEOF(err):
			return total, "", nil
		case err != nil:
			return total, "", err
		case n == 0:
			free <- buf
		}
	}
}
