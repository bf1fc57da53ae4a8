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
		// An engine resumes once: the operation in progress does it when it ends.
		c.setResumePending()
		c.resumeIfIdle(ctx)
	}
	return err
}

func (c *container) setResumePending() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.resumePending = true
}

// takeResumePending reports whether a Resume is pending, and that it is no
// longer.
func (c *container) takeResumePending() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	pending := c.resumePending
	c.resumePending = false
	return pending
}

// resumeIfIdle does a Resume that is pending, unless an operation is in
// progress, which calls this when it has ended.
func (c *container) resumeIfIdle(ctx context.Context) {
	c.mu.Lock()
	pending := c.resumePending
	c.mu.Unlock()
	if !pending {
		return
	}
	select {
	case c.slot <- struct{}{}:
	default:
		return
	}
	defer func() { <-c.slot }()
	c.resumeIfPending(ctx)
}

// resumeIfPending does a Resume that is pending. The caller holds the slot.
func (c *container) resumeIfPending(ctx context.Context) {
	if !c.takeResumePending() {
		return
	}
	ctx, cancel := cleanupContext(ctx)
	defer cancel()
	if err := c.current().resume(ctx); err != nil {
		log.G(ctx).WithError(err).WithField("container", c.id).Error("failed to resume container")
	}
}
