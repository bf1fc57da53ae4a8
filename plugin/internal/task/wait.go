package task

import (
	"context"
	"errors"
	"sync"

	"github.com/containerd/containerd/api/runtime/task/v2"
	"google.golang.org/protobuf/proto"
)

// waiter has at most one Wait for a container's first process on its way to
// Kata, however many engines ask: with each one that returns, Kata's Rust shim
// stops and cleans up the sandbox
// (src/runtime-rs/crates/runtimes/src/manager.rs), and two at once get into
// each other's way and leave its share behind.
type waiter struct {
	mu   sync.Mutex
	call *waitCall
}

type waitCall struct {
	done chan struct{}
	resp *task.WaitResponse
	err  error
}

// wait answers when a process has ended. One for a container that was
// abandoned Kata would let wait for ever.
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

// joinWait joins the Wait that is on its way, or sends one.
func (c *container) joinWait(ctx context.Context, r *task.WaitRequest) *waitCall {
	w := &c.waiter
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.call != nil {
		return w.call
	}
	call := &waitCall{done: make(chan struct{}), resp: &task.WaitResponse{}}
	w.call = call
	// With the metadata of who asked first, and not with its end.
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	unhook := context.AfterFunc(c.s.base, cancel)
	req := proto.Clone(r)
	go func() {
		defer close(call.done)
		defer cancel()
		defer unhook()
		if call.err = c.s.forward(ctx, "Wait", req, call.resp); call.err == nil {
			c.stopped()
			return
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		w.call = nil // for the next one to try
	}()
	return call
}
