package task

import (
	"context"

	"github.com/containerd/log"
)

// pause freezes a container through the agent, whatever it is for: to Kata a
// container that ends while Kata has it paused is lost.
func (c *container) pause(ctx context.Context) error {
	return c.do(ctx, func(st state) error { return st.pause(ctx) })
}

// resume thaws. When an operation is under way it waits for its end.
func (c *container) resume(ctx context.Context) error {
	entered := false
	err := c.do(ctx, func(st state) error {
		entered = true
		return st.resume(ctx)
	})
	if err != nil && !entered {
		// An engine resumes once: what is under way does it at its end.
		c.thawWanted.Store(true)
		c.settle(ctx)
	}
	return err
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
	ctx, cancel := cleanupContext(ctx)
	defer cancel()
	if err := c.current().resume(ctx); err != nil {
		log.G(ctx).WithError(err).WithField("container", c.id).Error("resume")
	}
}
