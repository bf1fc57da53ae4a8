// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/types/known/emptypb"
)

// closeWait is how long CloseIO waits for Kata's answer.
const closeWait = 100 * time.Millisecond

// closeIO forwards the call once the process has been started. A process that
// could not be started has no stdin to close.
//
// Kata's Go shim answers only after the client has closed its end of the stdin
// pipe as well, which ctr does after it has received the answer. So the answer
// is given after closeWait at the latest, while Kata's call continues.
func (s *Service) closeIO(ctx context.Context, r *task.CloseIORequest) (*emptypb.Empty, error) {
	if c := s.container(r.ID); c != nil {
		started, err := c.starts.wait(ctx, r.ExecID)
		if err != nil {
			return nil, fmt.Errorf("close the stdin of a process in container %s that has not been started: %w", r.ID, err)
		}
		if !started {
			return &emptypb.Empty{}, nil
		}
	}
	type answer struct {
		resp *emptypb.Empty
		err  error
	}
	answered := make(chan answer, 1)
	// Kata's call has the caller's metadata and deadline, but outlives its
	// cancellation. It ends with the service.
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(s.cfg.CheckpointTimeout)
	}
	kctx, cancel := context.WithDeadline(context.WithoutCancel(ctx), deadline)
	unhook := context.AfterFunc(s.base, cancel)
	begun := s.background(func(context.Context) {
		defer cancel()
		defer unhook()
		resp := &emptypb.Empty{}
		err := s.down.call(kctx, "CloseIO", r, resp)
		answered <- answer{resp, err}
	})
	if !begun {
		unhook()
		cancel()
		return nil, context.Cause(s.base)
	}
	select {
	case a := <-answered:
		if errors.Is(a.err, ttrpc.ErrClosed) {
			<-ctx.Done() // as in forward
			return nil, errKataGone
		}
		return a.resp, a.err
	case <-time.After(closeWait):
		return &emptypb.Empty{}, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}
