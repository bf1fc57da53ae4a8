// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/adjust"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/budget"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
	"github.com/kata-checkpoint/kata-checkpoint/internal/regular"
	"github.com/kata-checkpoint/kata-checkpoint/internal/remove"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/kata"
)

// restoreDir is the name in the exchange directory of an image set that is to
// be restored.
const restoreDir = "restore"

// exchange is the host directory through which a container's images are passed
// between host and guest. The guest can write to it while it is open, and only
// then: between Create and the first checkpoint, and between two of them,
// whoever owns the guest finds it read-only.
type exchange struct {
	dir string
	// stagingDir is for an image set on its way there.
	stagingDir string
	// token is the content of the marker file, by which the agent recognizes the
	// mount.
	token string
	// setWritable sets whether the guest can write to a directory.
	setWritable func(dir string, writable bool) error

	mu sync.Mutex
	// users is the number of operations that have it open.
	users int
	// removed: another container may have a directory at this path by now.
	removed bool
	// stale: an operation has ended, and whatever is there is of no use.
	stale bool
	// lost is why no image can be passed any more, nil as long as one can.
	lost error
	// staging is the image set that is being copied while Kata creates the
	// container, nil if none is.
	staging *staging
}

// newExchange creates a container's exchange directory. It removes what an
// earlier container of the same name left behind: containerd has at most one
// task of a name.
func newExchange(stateDir, namespace, id string, setWritable func(dir string, writable bool) error) (*exchange, error) {
	e := &exchange{
		dir: adjust.ExchangeDir(stateDir, namespace, id), stagingDir: adjust.StagingDir(stateDir, namespace, id),
		token: rand.Text(), setWritable: setWritable,
	}
	if err := errclass.Join(remove.All(e.dir), remove.All(e.stagingDir)); err != nil {
		return nil, fmt.Errorf("create exchange directory: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(e.dir), 0o700); err != nil {
		return nil, fmt.Errorf("create exchange directory: %w", err)
	}
	if err := os.Mkdir(e.dir, 0o700); err != nil {
		return nil, fmt.Errorf("create exchange directory: %w", err)
	}
	if err := e.mark(); err != nil {
		return nil, fmt.Errorf("create exchange directory: %w", errclass.Join(err, remove.All(e.dir)))
	}
	return e, nil
}

// mark writes the marker, where there is none.
func (e *exchange) mark() error {
	f, err := os.OpenFile(filepath.Join(e.dir, api.MarkerName), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString(e.token)
	return errclass.Join(err, f.Close())
}

func (e *exchange) path(name string) string { return filepath.Join(e.dir, name) }

// openExchange is an exchange directory while the guest can write to it.
type openExchange struct {
	e *exchange
	// ctx is done when it is closed, or when the guest has written more than it
	// may, which is its cause then.
	ctx    context.Context
	cancel context.CancelCauseFunc
	base   context.Context
	done   chan struct{}
}

// open lets the guest write to the directory, within limits, until the caller
// closes it or ctx is done.
func (e *exchange) open(ctx context.Context, limits budget.Limits) (*openExchange, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.lost != nil {
		return nil, errclass.With(errdefs.ErrFailedPrecondition, e.lost)
	}
	if err := checkUsage(ctx, e.dir, limits); err != nil {
		return nil, err
	}
	if e.users == 0 {
		// What is not found could not be made read-only either.
		if err := e.setWritable(e.dir, true); err != nil && !errors.Is(err, kata.ErrNotShared) {
			return nil, err
		}
	}
	e.users++
	o := &openExchange{e: e, base: ctx, done: make(chan struct{})}
	o.ctx, o.cancel = context.WithCancelCause(ctx)
	go func() {
		defer close(o.done)
		o.watch(limits)
	}()
	return o, nil
}

// watchEvery is the interval at which the guest's use of the directory is
// looked at. It grows with what there is to look at.
const watchEvery = 100 * time.Millisecond

// watch ends when the directory is closed or the guest has written too much.
func (o *openExchange) watch(limits budget.Limits) {
	pause := watchEvery
	for {
		select {
		case <-time.After(pause):
		case <-o.ctx.Done():
			return
		}
		begin := time.Now()
		if err := checkUsage(o.ctx, o.e.dir, limits); err != nil {
			o.cancel(err)
			return
		}
		pause = max(watchEvery, 20*time.Since(begin))
	}
}

// checkUsage explains what is wrong with what a guest has written.
func checkUsage(ctx context.Context, dir string, limits budget.Limits) error {
	limits.Files += otherFiles
	limits.Bytes = max(limits.Bytes, limits.Bytes+otherBytes) // it may be as large as can be
	err := imageset.CheckUsage(ctx, dir, limits)
	switch {
	case err == nil, ctx.Err() != nil:
		return nil //nolint:nilerr // it was closed meanwhile
	case errors.As(err, new(*budget.FullError)):
		return errclass.With(errdefs.ErrResourceExhausted, errcode.NoSpace.Errorf("no space left for the images in state_dir: %w", err))
	}
	return errclass.With(errdefs.ErrResourceExhausted, errcode.TooLarge.Errorf("the guest writes more than it may: %w", err))
}

// What may be in an exchange directory beside an image set: files and
// directories, and bytes, mostly of CRIU's log.
const (
	otherFiles = 64
	otherBytes = 256 << 20
)

// bind returns a context that is done when ctx or the directory's is.
func (o *openExchange) bind(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(o.ctx, func() { cancel(context.Cause(o.ctx)) })
	return ctx, func() {
		stop()
		cancel(nil)
	}
}

// close takes the guest's right to write away. That may take longer than the
// call, if the guest has yet to close its files.
func (o *openExchange) close() {
	o.cancel(nil)
	<-o.done
	o.e.mu.Lock()
	o.e.users--
	o.e.stale = true
	o.e.mu.Unlock()
	o.e.shut(o.base)
}

// shutTimeout is how long a guest may have files open for writing after an
// operation. Closing them takes it milliseconds.
const shutTimeout = 30 * time.Second

// shut takes the guest's right to write away, unless an operation has the
// directory open. It repeats that in the background while the guest has files
// open for writing. If it does not close them, the directory is deleted:
// nothing new can be written then.
func (e *exchange) shut(ctx context.Context) {
	if !errors.Is(e.tryShut(ctx), kata.ErrInUse) {
		return
	}
	go func() {
		limit := time.After(shutTimeout)
		for pause := time.Millisecond; ; pause = min(2*pause, time.Second) {
			select {
			case <-time.After(pause):
			case <-ctx.Done():
				return
			case <-limit:
				e.lose(ctx)
				return
			}
			if !errors.Is(e.tryShut(ctx), kata.ErrInUse) {
				return
			}
		}
	}()
}

func (e *exchange) tryShut(ctx context.Context) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.users > 0 || e.removed {
		return nil
	}
	err := e.setWritable(e.dir, false)
	if errors.Is(err, kata.ErrInUse) {
		return err
	}
	// The VM may have ended with the operation.
	if err != nil && !errors.Is(err, fs.ErrNotExist) && (!e.stale || !errors.Is(err, kata.ErrNotShared)) {
		log.G(ctx).WithError(err).Warn("failed to make exchange directory read-only for the guest")
	}
	if e.stale {
		if err := e.sweep(); err != nil {
			log.G(ctx).WithError(err).Warn("failed to remove what a guest has left in its exchange directory")
		}
		e.stale = false
	}
	return err
}

// sweep removes what a guest has left, the marker too if it has changed it.
func (e *exchange) sweep() error {
	dir, err := os.Open(e.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // the container is being deleted
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	for {
		names, err := dir.Readdirnames(1024)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		for _, name := range names {
			if name == api.MarkerName && e.isMarked() {
				continue
			}
			if err := remove.All(e.path(name)); err != nil {
				return err
			}
		}
	}
	if e.isMarked() {
		return nil
	}
	return e.mark()
}

// isMarked reports whether there is a marker as the shim writes it. Nobody reads
// it again: what matters is what it occupies.
func (e *exchange) isMarked() bool {
	st, err := os.Lstat(filepath.Join(e.dir, api.MarkerName))
	return err == nil && st.Mode() == 0o600 && st.Size() == int64(len(e.token))
}

// lose gives the directory up.
func (e *exchange) lose(ctx context.Context) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.users > 0 || e.removed {
		return
	}
	e.lost = errcode.ExchangeLost.Wrap(errors.New("the guest did not close the files of an earlier checkpoint or restore, so that it may no longer write to the host: recreate the container"))
	log.G(ctx).WithError(e.lost).WithField("directory", e.dir).Error("deleting exchange directory: its container can no longer be checkpointed")
	if err := e.removeLocked(); err != nil {
		log.G(ctx).WithError(err).Error("failed to delete exchange directory")
	}
}

const (
	// discardWait is how long stale images are kept while the container is frozen.
	discardWait = 30 * time.Second
	// discardTimeout bounds their removal by the guest.
	discardTimeout = 30 * time.Second
)

// discardImages removes stale images, once the container is running again, and
// closes the exchange directory. The guest removes them: its kernel would keep
// the cached pages of files that the host removes until it is short of memory,
// and each checkpoint would make the VM larger by its image set.
func (c *container) discardImages(directories []string, open *openExchange) {
	defer open.close()
	if c.execGate.enter(open.ctx, discardWait) == nil {
		c.execGate.leave()
	}
	ctx, cancel := context.WithTimeout(open.ctx, discardTimeout)
	defer cancel()
	logger := log.G(ctx).WithField("container", c.id)
	for _, images := range directories {
		err := c.s.agent.Notify(ctx, func(ctx context.Context, a api.AgentService) error {
			_, err := a.Discard(ctx, &api.DiscardRequest{ContainerId: c.id, Directory: images, Token: c.exchange.token})
			return err
		})
		if err != nil {
			logger.WithError(err).Debug("failed to have the guest remove stale images")
		}
		if err := remove.All(c.exchange.path(images)); err != nil {
			logger.WithError(err).Warn("failed to remove stale images")
		}
	}
}

// present reports whether the directory is there, and not that of another
// container of the same name.
func (e *exchange) present() bool {
	if e == nil {
		return false
	}
	f, _, err := regular.Open(unix.AT_FDCWD, e.path(api.MarkerName), 0)
	if err != nil {
		return false
	}
	defer f.Close()
	token, err := io.ReadAll(io.LimitReader(f, int64(len(e.token))+1))
	return err == nil && string(token) == e.token
}

// remove removes the directory. Even where it is still mounted in a container,
// nothing can be written through it from then on: no file system creates
// entries in a removed directory.
func (e *exchange) remove() error {
	if e == nil {
		return nil
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.removeLocked()
}

// removeLocked is called with the mutex held.
func (e *exchange) removeLocked() error {
	e.removed = true
	if err := errclass.Join(e.staging.end(), remove.All(e.dir)); err != nil {
		return fmt.Errorf("remove exchange directory: %w", err)
	}
	return nil
}
