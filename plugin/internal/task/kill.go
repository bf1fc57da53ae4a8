// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"fmt"
	"syscall"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v2"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
)

// kill forwards the signal, except where the container's state has to deal with
// it: Kata would report no exit of a container that was never started.
func (c *container) kill(ctx context.Context, r *task.KillRequest) (*emptypb.Empty, error) {
	if isEnd(r) {
		ask(&c.ending.kill)
	}
	if c.forwardsKill(r) {
		return c.s.forwardEmpty(ctx, "Kill", r)
	}
	if request := c.jobControl(r); request != nil {
		return &emptypb.Empty{}, c.s.callAgent(ctx, func(ctx context.Context, a api.AgentService) error {
			_, err := a.Signal(ctx, request)
			return err
		})
	}
	// A SIGKILL is not to wait for a Start: it ends it, and with it the container.
	ended := c.interruptStart()
	done := false
	err := c.do(ctx, func(st state) (err error) {
		done, err = st.kill(ctx)
		return err
	})
	if ended && hasStopped(c.current()) {
		return &emptypb.Empty{}, nil
	}
	if err != nil || done {
		return &emptypb.Empty{}, err
	}
	return c.s.forwardEmpty(ctx, "Kill", r)
}

// errKilled is why a restore was interrupted.
var errKilled = errclass.Unavailable(errcode.Killed, "the container was killed meanwhile")

// interruptible returns the context of a Start or a restore, or of a part of it,
// which a SIGKILL ends. The caller calls the function at the end.
func (c *container) interruptible(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	c.mu.Lock()
	defer c.mu.Unlock()
	whole := c.interrupt
	c.interrupt = func(cause error) {
		cancel(cause)
		if whole != nil {
			whole(cause)
		}
	}
	return ctx, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.interrupt = whole
		cancel(nil)
	}
}

// interruptStart ends the Start in progress, and reports whether there was one.
func (c *container) interruptStart() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.interrupt == nil {
		return false
	}
	c.interrupt(errKilled)
	return true
}

// forwardsKill reports whether a Kill is for Kata alone; c is nil for a
// container that this shim has not created.
func (c *container) forwardsKill(r *task.KillRequest) bool {
	switch {
	case c == nil:
		return true
	case c.jobControl(r) != nil:
		return false
	case r.ExecID != "":
		return true
	}
	return c.current().forwardsKill(r.Signal)
}

// jobControl returns what the agent is called with to stop or continue a process
// of a restored container, or nil for any other Kill. Kata would stop the
// placeholder or the exec helper, which cannot pass that on. What continues them
// takes the same way, so that the two stay in order.
func (c *container) jobControl(r *task.KillRequest) *api.SignalRequest {
	if r.Signal != uint32(syscall.SIGSTOP) && r.Signal != uint32(syscall.SIGCONT) || c.source == nil || !c.managed() {
		return nil
	}
	request := &api.SignalRequest{ContainerId: c.id, Signal: r.Signal, Token: c.exchange.token}
	if r.ExecID != "" {
		e, ok := c.execs.Load(r.ExecID)
		if !ok {
			return nil
		}
		request.HelperToken = e.(*restoredExec).token
	}
	return request
}

// killAndWait kills a container, frozen or not, and waits until Kata reports it
// as stopped. It polls State: in Kata's Rust shim a Wait for the sandbox's
// container stops the sandbox (src/runtime-rs/crates/runtimes/src/manager.rs).
func (c *container) killAndWait(ctx context.Context) error {
	err := c.s.down.kill(ctx, &task.KillRequest{ID: c.id, Signal: uint32(syscall.SIGKILL), All: true})
	if err != nil && !isGone(err) {
		return fmt.Errorf("kill container %s: %w", c.id, err)
	}
	for pause := 2 * time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		st, err := c.s.down.state(ctx, c.id)
		if isGone(err) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("wait for container %s to stop: %w", c.id, err)
		}
		if st.GetStatus() == statusStopped {
			c.stopped()
			return nil
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return fmt.Errorf("wait for container %s to stop: %w", c.id, context.Cause(ctx))
		}
	}
}
