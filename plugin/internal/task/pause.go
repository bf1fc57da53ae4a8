package task

import (
	"context"

	"github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/log"
	"google.golang.org/protobuf/types/known/emptypb"
)

// Pause freezes a container through the agent, whatever it is for: to Kata a
// container that ends while Kata has it paused is lost.
func (s *Service) Pause(ctx context.Context, r *task.PauseRequest) (*emptypb.Empty, error) {
	c := s.container(r.ID)
	if c == nil {
		return s.passEmpty(ctx, "Pause", r)
	}
	if err := c.do(ctx, func(st state) error { return st.pause(ctx) }); err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, nil
}

// Resume thaws. When an operation is under way it waits for its end.
func (s *Service) Resume(ctx context.Context, r *task.ResumeRequest) (*emptypb.Empty, error) {
	c := s.container(r.ID)
	if c == nil {
		return s.passEmpty(ctx, "Resume", r)
	}
	entered := false
	err := c.do(ctx, func(st state) error {
		entered = true
		return st.resume(ctx)
	})
	if err != nil {
		if !entered {
			// An engine resumes once: what is under way does it at its end.
			c.thawWanted.Store(true)
			c.settle(ctx)
		}
		return nil, err
	}
	return &emptypb.Empty{}, nil
}

// settle does the Resume that gave up waiting, unless an operation is still
// under way, which calls it at its end.
func (c *container) settle(ctx context.Context) {
	select {
	case c.ops <- struct{}{}:
	default:
		return
	}
	defer func() { <-c.ops }()
	c.resumeIfWanted(ctx)
}

// resumeIfWanted is called with the right to change the state.
func (c *container) resumeIfWanted(ctx context.Context) {
	if !c.thawWanted.Swap(false) {
		return
	}
	ctx, cancel := undo(ctx)
	defer cancel()
	if err := c.current().resume(ctx); err != nil {
		log.G(ctx).WithError(err).WithField("container", c.id).Error("resume")
	}
}
