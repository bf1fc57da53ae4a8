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

// closeWait is how long a CloseIO waits for Kata's answer.
const closeWait = 100 * time.Millisecond

// closeIO is forwarded once the process has been started. One that could not
// be has nothing to close.
//
// Kata's Go shim answers only when the client has closed its end of the stdin
// pipe, too, which containerd's own ctr does after the answer: there the answer
// is given first.
func (s *Service) closeIO(ctx context.Context, r *task.CloseIORequest) (*emptypb.Empty, error) {
	if c := s.container(r.ID); c != nil {
		started, err := c.starts.wait(ctx, r.ExecID)
		if err != nil {
			return nil, fmt.Errorf("close stdin of a process in container %s that has not started: %w", r.ID, err)
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
	// The caller's metadata and deadline, and not the end of its call; but ours.
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(s.cfg.CheckpointTimeout)
	}
	kctx, cancel := context.WithDeadline(context.WithoutCancel(ctx), deadline)
	unhook := context.AfterFunc(s.base, cancel)
	s.wg.Add(1)
	go func() {
		defer s.wg.Done()
		defer cancel()
		defer unhook()
		resp := &emptypb.Empty{}
		err := s.down.call(kctx, "CloseIO", r, resp)
		answered <- answer{resp, err}
	}()
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
