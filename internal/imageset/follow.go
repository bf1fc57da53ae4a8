// SPDX-License-Identifier: Apache-2.0

package imageset

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/budget"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/thread"
)

const (
	// followFrom is the size in bytes from which a file is copied while it grows.
	followFrom = 1 << 20
	// followBuffer is the size of a read in bytes: what is read is digested and
	// written from a processor's own cache, and the guest has the memory's bandwidth.
	followBuffer = 128 << 10
	// writeOutFrom is how much is given to the disk at once, in bytes.
	writeOutFrom = 4 << 20
	// maxFollowed bounds their number: each needs two descriptors.
	maxFollowed = 64
	// followEvery is the interval at which the follower looks for more data. Each
	// wake-up takes a processor from the guest that writes.
	followEvery = 20 * time.Millisecond
)

// Follower copies the flat directory of images that an untrusted guest writes.
// The container stays frozen until everything is copied, so large files are
// copied while they grow: CRIU only appends to them. That assumption is not
// trusted: a copy that began early is compared with its source in the end, and
// repeated if they differ.
type Follower struct {
	src, name string
	dst       *os.File
	room      *budget.Room // the goroutine's until ended is closed
	limits    Limits
	skip      []string
	// composed are put together from others.
	composed map[string]Composition

	once  sync.Once
	stop  chan struct{}
	ended chan struct{}
	// growing and buffer are the goroutine's until ended is closed.
	growing map[string]*growing
	buffer  []byte
}

// Follow starts to copy what appears in the directory name beneath src to dst,
// except the files in skip, until [Follower.Collect] or [Follower.Stop].
func Follow(src, name string, dst *os.File, limits Limits, skip ...string) *Follower {
	f := &Follower{
		src: src, name: name, dst: dst, room: budget.NewRoom(dst, limits.Reserve), limits: limits, skip: skip,
		stop: make(chan struct{}), ended: make(chan struct{}), growing: make(map[string]*growing), buffer: make([]byte, followBuffer),
	}
	go func() {
		defer close(f.ended)
		_ = thread.Do(func() error { f.run(); return nil })
	}()
	return f
}

// halt stops the goroutine and waits for it.
func (f *Follower) halt() {
	f.once.Do(func() { close(f.stop) })
	<-f.ended
}

// Stop stops copying. What has been copied stays in dst.
func (f *Follower) Stop() {
	f.halt()
	for _, g := range f.growing {
		g.close()
	}
	clear(f.growing)
}

// Collect completes the copies once the guest has written everything, and
// returns the files with their digests, sorted by name. It accepts only regular
// files, within the limits.
func (f *Follower) Collect(ctx context.Context) ([]File, error) {
	f.halt()
	defer f.Stop()
	dir, names, err := f.list()
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	for name := range f.growing {
		if !slices.Contains(names, name) { // the guest has removed it
			if err := f.forget(name); err != nil {
				return nil, err
			}
		}
	}
	for name := range f.composed {
		if !slices.Contains(names, name) {
			return nil, errcode.GuestWroteWrong.Errorf("the guest has not written %s, which is to be put together", name)
		}
	}
	var files []File
	left := f.limits
	for _, n := range names {
		if isOurs(n) {
			return nil, errcode.GuestWroteWrong.Errorf("the guest wrote %s, which only the host may write", n)
		}
		file, err := f.collect(ctx, dir, n, &left)
		if err != nil {
			return nil, fmt.Errorf("copy images from the guest: %w", err)
		}
		files = append(files, file)
	}
	return files, nil
}

// list opens the directory, and returns the sorted names in it, less skip.
func (f *Follower) list() (*os.File, []string, error) {
	top, err := openDir(f.src)
	if err != nil {
		return nil, nil, err
	}
	defer top.Close()
	dir, err := openDirBeneath(top, f.name)
	if err != nil {
		return nil, nil, err
	}
	names, err := list(dir, f.limits.Files)
	if err != nil {
		return nil, nil, errclass.Join(err, dir.Close())
	}
	return dir, slices.DeleteFunc(names, func(n string) bool { return slices.Contains(f.skip, n) }), nil
}

func (f *Follower) collect(ctx context.Context, dir *os.File, name string, left *Limits) (File, error) {
	if c, ok := f.composed[name]; ok {
		return f.compose(ctx, name, c, left)
	}
	src, st, err := openRegular(dir, name)
	if err != nil {
		return File{}, err
	}
	defer src.Close()
	if err := left.Take(st.Size); err != nil {
		return File{}, err
	}
	file := File{Name: name, Size: st.Size}
	if g := f.growing[name]; g != nil {
		if file.BLAKE3, err = g.finish(ctx, src, st.Size); err != nil || file.BLAKE3 != "" {
			return file, err
		}
		if err := f.forget(name); err != nil {
			return file, err
		}
	}
	file.BLAKE3, err = copyFile(ctx, src, st.Size, f.dst, name, f.room, newDigest())
	return file, err
}

// forget removes an incomplete copy.
func (f *Follower) forget(name string) error {
	f.growing[name].close()
	delete(f.growing, name)
	return unix.Unlinkat(int(f.dst.Fd()), name, 0)
}

// run copies until it is stopped or something fails. Collect, which copies
// whatever is missing, then returns the error.
func (f *Follower) run() {
	if canClone(f.src, f.dst) {
		return // Collect clones at once
	}
	// The guest has precedence.
	if err := unix.Setpriority(unix.PRIO_PROCESS, 0, 19); err != nil {
		return
	}
	tick := time.NewTicker(followEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-f.stop:
			return
		}
		if err := f.pass(); err != nil {
			for name := range f.growing {
				_ = f.forget(name) // if this fails, so does Collect, which makes a new file
			}
			return
		}
	}
}

// pass copies what has been written since the last pass.
func (f *Follower) pass() error {
	dir, names, err := f.list()
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	left := f.limits
	for _, n := range names {
		g, err := f.open(dir, n)
		if err != nil {
			return err
		}
		if g == nil {
			continue
		}
		size, err := g.src.Seek(0, io.SeekEnd)
		if err != nil {
			return err
		}
		if err := left.Take(size); err != nil {
			return err
		}
		if err := g.grow(g.src, size, func() bool { return isClosed(f.stop) }); err != nil {
			return err
		}
	}
	return nil
}

// open returns the copy of a file that is large enough to be followed, nil for
// others.
func (f *Follower) open(dir *os.File, name string) (*growing, error) {
	if g := f.growing[name]; g != nil || len(f.growing) == maxFollowed {
		return g, nil
	}
	// Most files are small, and there are some for each process: they are not
	// opened each time. What is here may be replaced by the guest, and counts for
	// nothing else.
	var st unix.Stat_t
	if err := unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err == nil && st.Mode&unix.S_IFMT == unix.S_IFREG && st.Size < followFrom {
		return nil, nil
	}
	src, st, err := openRegular(dir, name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // renamed since it was listed
	}
	if err != nil {
		return nil, err
	}
	if st.Size < followFrom {
		return nil, src.Close()
	}
	out, err := create(f.dst, name)
	if err != nil {
		return nil, errclass.Join(err, src.Close())
	}
	g := &growing{src: src, out: out, sparse: budget.NewSparseWriter(out, f.room), digest: newDigest(), buffer: f.buffer}
	f.growing[name] = g
	return g, nil
}

// growing is a file that is copied while it grows.
type growing struct {
	src, out *os.File
	sparse   *budget.SparseWriter // to out
	size     int64                // of the copy, bytes
	// writtenOut is how much of it has been given to the disk.
	writtenOut int64
	digest     hash.Hash
	buffer     []byte // the follower's
}

func (g *growing) close() {
	g.src.Close()
	g.out.Close() // grow or the comparison notices what was not written
}

// grow copies src up to its size unless it is stopped.
func (g *growing) grow(src io.ReaderAt, size int64, stopped func() bool) error {
	for g.size < size && !stopped() {
		n, err := src.ReadAt(g.buffer[:min(int64(len(g.buffer)), size-g.size)], g.size)
		if n > 0 {
			if _, err := g.sparse.Write(g.buffer[:n]); err != nil {
				return err
			}
			g.digest.Write(g.buffer[:n])
			g.size += int64(n)
			if g.size-g.writtenOut >= writeOutFrom {
				writeOut(g.out, g.writtenOut, g.size-g.writtenOut)
				g.writtenOut = g.size
			}
		}
		switch {
		case isEOF(err) && n == 0:
			return nil // it has shrunk
		case err != nil && !isEOF(err):
			return err
		}
	}
	return nil
}

// finish completes the copy of a file that has grown to size and returns its
// digest, or none if the copy differs from the file.
func (g *growing) finish(ctx context.Context, src *os.File, size int64) (string, error) {
	early := g.size
	err := g.grow(src, size, func() bool { return ctx.Err() != nil })
	if err == nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil || g.size != size {
		return "", err
	}
	if err := g.sparse.Finish(); err != nil {
		return "", err
	}
	same, err := equal(ctx, src, g.out, early)
	if err != nil || !same {
		return "", err
	}
	if err := g.out.Close(); err != nil {
		return "", err
	}
	return hexSum(g.digest), nil
}

// equal compares the first size bytes of two files, on all processors.
func equal(ctx context.Context, a, b io.ReaderAt, size int64) (bool, error) {
	errDiffer := errors.New("they differ")
	group, ctx := errgroup.WithContext(ctx)
	workers := int64(runtime.GOMAXPROCS(0))
	for w := range workers {
		group.Go(func() error {
			one, two := make([]byte, copyBuffer), make([]byte, copyBuffer)
			for at := w * copyBuffer; at < size; at += workers * copyBuffer {
				if ctx.Err() != nil {
					return context.Cause(ctx)
				}
				n := min(copyBuffer, size-at)
				_, aerr := a.ReadAt(one[:n], at)
				_, berr := b.ReadAt(two[:n], at)
				switch err := errclass.Join(aerr, berr); {
				case isEOF(err): // the guest has truncated it
					return errDiffer
				case err != nil:
					return err
				case !bytes.Equal(one[:n], two[:n]):
					return errDiffer
				}
			}
			return nil
		})
	}
	err := group.Wait()
	if errors.Is(err, errDiffer) {
		return false, nil
	}
	return err == nil, err
}

// canClone reports whether files in the directory src can share their blocks
// with files in dst.
func canClone(src string, dst *os.File) bool {
	var from, to unix.Stat_t
	if unix.Stat(src, &from) != nil || unix.Fstat(int(dst.Fd()), &to) != nil || from.Dev != to.Dev {
		return false
	}
	var fds [2]int
	for i := range fds {
		fd, err := unix.Openat(int(dst.Fd()), ".", unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return false
		}
		defer unix.Close(fd)
		fds[i] = fd
	}
	return unix.IoctlFileClone(fds[0], fds[1]) == nil
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}
