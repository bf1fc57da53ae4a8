// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
	"github.com/kata-checkpoint/kata-checkpoint/internal/remove"
)

// overlapFrom is the size in bytes of image sets that are copied and verified
// while Kata creates the container, which may take a VM's start. What is wrong
// with the files of a smaller one is found before Kata is asked for anything.
const overlapFrom = 64 << 20

// staging is an image set that is being copied and verified.
type staging struct {
	// dir is the copy. The guest does not see it, nor can it write there, as it can
	// to the exchange directory until Kata's Create has ended.
	dir    string
	cancel context.CancelCauseFunc
	// done is closed at its end, after which the rest is valid.
	done     chan struct{}
	err      error
	duration time.Duration
}

// stageBehind begins to copy an image set, and calls copied when that has ended.
// Unless it returns an error, it closes the set.
func (c *container) stageBehind(ctx context.Context, from *source, set *imageset.Set, copied func()) error {
	begin := time.Now()
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	st := &staging{dir: c.exchange.stagingDir, cancel: cancel, done: make(chan struct{})}
	if !c.s.background(func(base context.Context) {
		defer close(st.done)
		defer copied()
		defer set.Close()
		unhook := context.AfterFunc(base, func() { cancel(context.Cause(base)) })
		defer unhook()
		ctx, leave := c.s.operation(ctx)
		defer leave()
		st.err = set.CopyTo(ctx, st.dir, c.s.limits())
		st.duration = time.Since(begin)
		if st.err == nil {
			c.logStaged(ctx, from, st.duration)
		}
	}) {
		cancel(nil)
		return context.Cause(c.s.base)
	}
	c.exchange.setStaging(st)
	return nil
}

// awaitImages waits until the image set is in the exchange directory, and returns
// how long it has waited.
func (c *container) awaitImages(ctx context.Context) (time.Duration, error) {
	begin := time.Now()
	st := c.exchange.staged()
	if st == nil {
		return 0, nil
	}
	select {
	case <-st.done:
	case <-ctx.Done():
		st.cancel(context.Cause(ctx))
		return time.Since(begin), context.Cause(ctx)
	}
	if st.err != nil {
		return time.Since(begin), errclass.With(errdefs.ErrFailedPrecondition, st.err)
	}
	c.source.staged = st.duration
	// Whatever the guest has put there is not replaced.
	if err := unix.Renameat2(unix.AT_FDCWD, st.dir, unix.AT_FDCWD, c.exchange.path(restoreDir), unix.RENAME_NOREPLACE); err != nil {
		return time.Since(begin), fmt.Errorf("stage checkpoint: %w", &os.PathError{Op: "move", Path: st.dir, Err: err})
	}
	return time.Since(begin), nil
}

func (e *exchange) setStaging(st *staging) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.staging = st
}

func (e *exchange) staged() *staging {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.staging
}

// end ends it, and removes the copy unless that has been moved.
func (st *staging) end() error {
	if st == nil {
		return nil
	}
	st.cancel(nil)
	<-st.done
	return remove.All(st.dir)
}
