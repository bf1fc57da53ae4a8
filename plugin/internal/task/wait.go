// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"errors"
	"sync"

	"github.com/containerd/containerd/api/runtime/task/v2"
	"google.golang.org/protobuf/proto"
)

// waiter keeps at most one Wait for a container's init in flight to Kata;
// concurrent callers share it. Kata's Rust shim stops and cleans up the sandbox
// for each one that returns (src/runtime-rs/crates/runtimes/src/manager.rs),
// and two at once interfere and leave its share behind.
type waiter struct {
	mu   sync.Mutex
	call *waitCall
}

type waitCall struct {
	done chan struct{}
	resp *task.WaitResponse
	err  error
}

// wait returns when a process has exited. For an abandoned container it is
// answered here: in Kata the Wait would never return.
func (c *container) wait(ctx context.Context, r *task.WaitRequest) (*task.WaitResponse, error) {
	if r.ExecID != "" {
		resp := &task.WaitResponse{}
		return resp, c.s.forward(ctx, "Wait", r, resp)
	}
	call := c.joinWait(ctx, r)
	select {
	case <-call.done:
	case <-c.abandoned:
		return c.current().(abandonedState).wait(), nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if errors.Is(call.err, errKataGone) {
		<-ctx.Done() // no answer, see [Service.forward]
	}
	return call.resp, call.err
}

// joinWait returns the Wait in flight, or sends one.
func (c *container) joinWait(ctx context.Context, r *task.WaitRequest) *waitCall {
	w := &c.waiter
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.call != nil {
		return w.call
	}
	call := &waitCall{done: make(chan struct{}), resp: &task.WaitResponse{}}
	w.call = call
	// It has the metadata of the first caller but outlives its cancellation.
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	unhook := context.AfterFunc(c.s.base, cancel)
	req := proto.Clone(r)
	go func() {
		defer close(call.done)
		defer cancel()
		defer unhook()
		call.err = c.s.forward(ctx, "Wait", req, call.resp)
		if call.err == nil && c.initStart.Load().failed(ctx) {
			// Kata's Go shim answers at once, although the init may run. It is ended,
			// and then [container.wait] answers.
			select {
			case <-c.exitReported:
			case <-ctx.Done():
				call.err = ctx.Err()
			}
		}
		if call.err == nil {
			c.stopped()
			return
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		w.call = nil // the next caller sends another
	}()
	return call
}
