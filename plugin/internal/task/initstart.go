// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
)

// initStart is the Start of a container's init in Kata. Kata completes it whether or
// not anybody waits, perhaps long after its caller has given up: then the init may
// run although the engine has been told that it does not.
type initStart struct {
	// answered is closed when Kata has answered, with err.
	answered chan struct{}
	err      error
}

// failed reports whether Kata has answered, or answers before ctx ends, that the
// Start has failed. No Start is none that has failed.
func (i *initStart) failed(ctx context.Context) bool {
	if i == nil {
		return false
	}
	select {
	case <-i.answered:
		return i.err != nil
	case <-ctx.Done():
		return false
	}
}

// inFlight reports whether Kata was asked and has not answered.
func (i *initStart) inFlight() bool {
	if i == nil {
		return false
	}
	select {
	case <-i.answered:
		return false
	default:
		return true
	}
}

// errNoAnswer means that Kata has not answered the Start of a container that is to
// be ended.
var errNoAnswer = errclass.Unavailable(errcode.KataLate, "Kata has not answered its Start yet, after which it is ended")

// withoutCancel returns a context without the caller's cancellation, but with its
// deadline.
func withoutCancel(ctx context.Context) (context.Context, context.CancelFunc) {
	limit, ok := ctx.Deadline()
	ctx = context.WithoutCancel(ctx)
	if !ok {
		return context.WithCancel(ctx)
	}
	return context.WithDeadline(ctx, limit)
}

// startInKata has Kata start init. So that the outcome is known even if containerd
// is killed meanwhile, it waits until the caller's deadline in spite of a
// cancellation, but no longer than for a SIGKILL. If it returns an error, the caller
// calls [container.endFailedStart].
func (c *container) startInKata(ctx context.Context, r *task.StartRequest) (*task.StartResponse, error) {
	wctx, cancelWait := withoutCancel(ctx)
	defer cancelWait()
	wctx, end := c.interruptible(wctx)
	defer end()
	resp := &task.StartResponse{}
	start := &initStart{answered: make(chan struct{})}
	c.initStart.Store(start)
	// Without a deadline, at which Kata's Rust shim would drop the call halfway.
	kctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	unhook := context.AfterFunc(c.s.base, cancel)
	req := proto.Clone(r)
	go func() {
		defer close(start.answered)
		defer cancel()
		defer unhook()
		start.err = c.s.down.call(kctx, "Start", req, resp)
	}()
	done := ctx.Done()
	for {
		select {
		case <-start.answered:
			if errors.Is(start.err, ttrpc.ErrClosed) {
				<-ctx.Done() // see [Service.forward]
				return nil, errKataGone
			}
			return resp, start.err
		case <-done:
			if cause := context.Cause(ctx); !errors.Is(cause, context.Canceled) {
				return nil, fmt.Errorf("start container %s: %w", c.id, cause)
			}
			done = nil
		case <-wctx.Done():
			if cause := context.Cause(wctx); !errors.Is(cause, context.DeadlineExceeded) {
				return nil, fmt.Errorf("start container %s: %w", c.id, cause)
			}
			<-ctx.Done() // which has the same deadline
			return nil, fmt.Errorf("start container %s: %w", c.id, context.Cause(ctx))
		}
	}
}

// endFailedStart ends what a Start has left that has failed or was given up: at once
// if Kata can, else as soon as it can. The error is why it was not at once.
func (c *container) endFailedStart(ctx context.Context) error {
	c.transition(endingState{createdState{c: c}})
	if c.initStart.Load().inFlight() {
		c.collectEnd()
		return nil // the Start's error says enough
	}
	uctx, cancel := cleanupContext(ctx)
	defer cancel()
	err := c.end(uctx)
	if err != nil {
		c.collectEnd()
	}
	return err
}

// mustEnd reports whether a container whose Start has failed or was given up is still
// to be ended: not once Kata has followed it to its end, or was made to forget it.
func (c *container) mustEnd(st state) bool {
	switch st.name() {
	case "abandoned":
		return false
	case "stopped":
		return c.initStart.Load().err != nil
	}
	return true
}

// end ends a container that Kata has been asked to start, with an exit, and nothing
// is left of a restore. It waits for Kata's answer to the Start.
func (c *container) end(ctx context.Context) error {
	start := c.initStart.Load()
	select {
	case <-start.answered:
	case <-ctx.Done():
		return fmt.Errorf("end container %s: %w", c.id, errNoAnswer)
	}
	end := c.killAndWait
	if start.err != nil {
		end = c.endUnfollowed
	}
	if err := end(ctx); err != nil || c.source == nil {
		return err
	}
	return c.source.once.cancel() // nothing is left of it: it may be tried again
}

// endUnfollowed ends a container whose Start has failed in Kata. That may have
// started its init all the same, but does not follow it: its Go shim reports it as
// running from then on (src/runtime/pkg/containerd-shim-v2/start.go), its Rust shim
// as stopped without an exit
// (src/runtime-rs/crates/runtimes/virt_container/src/container_manager/container.rs).
func (c *container) endUnfollowed(ctx context.Context) error {
	st, err := c.s.down.state(ctx, c.id)
	switch {
	case isGone(err):
		return nil
	case err != nil:
		return err
	case st.GetStatus() != statusCreated:
		err := c.s.down.kill(ctx, &task.KillRequest{ID: c.id, Signal: uint32(syscall.SIGKILL), All: true})
		if err != nil && !isGone(err) {
			return fmt.Errorf("kill container %s: %w", c.id, err)
		}
	}
	c.abandon(ctx)
	return nil
}

// collectEnd ends a container that was not started or not restored, as soon as Kata
// can: its Start may succeed after all, and a VM that did not answer may have
// restored processes in it, which run once it continues.
func (c *container) collectEnd() {
	c.s.background(func(ctx context.Context) {
		select {
		case <-c.initStart.Load().answered:
		case <-ctx.Done():
			return
		}
		for pause := firstThawPause; ; pause = min(2*pause, lastThawPause) {
			err := c.do(ctx, func(st state) error {
				if !c.mustEnd(st) {
					return nil // somebody else was first
				}
				uctx, cancel := cleanupContext(ctx)
				defer cancel()
				return c.end(uctx)
			})
			if err == nil {
				return
			}
			log.G(ctx).WithError(err).WithField("container", c.id).Warn("failed to end a container that was not started, trying again")
			timer := time.NewTimer(pause)
			select {
			case <-timer.C:
			case <-ctx.Done():
				timer.Stop()
				return
			}
		}
	})
}
