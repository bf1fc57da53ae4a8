// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"

	"github.com/containerd/log"
)

// pause freezes a container through the agent. Kata's own Pause is not used,
// not even for a user's: Kata loses track of a container that exits while it is
// paused.
func (c *container) pause(ctx context.Context) error {
	return c.do(ctx, func(st state) error { return st.pause(ctx) })
}

// resume thaws a container. It waits for the operation in progress.
func (c *container) resume(ctx context.Context) error {
	err := c.do(ctx, func(st state) error { return st.resume(ctx) })
	if err != nil && ctx.Err() != nil {
		// Engines resume once, so that this is made up for when the operation in
		// progress ends, or at once if it was this one.
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

// takeResumePending reports whether a Resume is pending, and clears it.
func (c *container) takeResumePending() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	pending := c.resumePending
	c.resumePending = false
	return pending
}

// resumeIfIdle does a pending Resume, unless an operation is in progress, which
// calls this when it has ended.
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

// resumeIfPending does a pending Resume. The caller holds the slot.
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
