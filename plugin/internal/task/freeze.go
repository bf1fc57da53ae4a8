// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/guest"
)

// freeze has the agent freeze all processes.
func (c *container) freeze(ctx context.Context) error {
	turn := c.turn.Add(1)
	err := c.s.callAgent(ctx, func(ctx context.Context, a api.AgentService) error {
		ctx, cancel := c.s.freezeContext(ctx)
		defer cancel()
		_, err := a.Freeze(ctx, &api.ContainerRequest{ContainerId: c.id, Token: c.exchange.token, Turn: turn})
		return withCause(ctx, err)
	})
	if err != nil {
		return fmt.Errorf("freeze container %s: %w", c.id, err)
	}
	c.freezes.begin()
	return nil
}

// freezeContext bounds what the agent takes to freeze or thaw a container, and
// not what it takes to restart an agent that has died, which has AgentTimeout.
func (s *Service) freezeContext(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, s.cfg.FreezeTimeout, errcode.FreezeTimeout.Errorf("freeze_timeout of %s has expired: %w", s.cfg.FreezeTimeout, context.DeadlineExceeded))
}

// clockMargin is how much earlier than here a deadline that ttrpc has passed on may
// expire in the guest.
const clockMargin = time.Second

// withCause replaces the error of a call by the cause for which its context has
// ended. The other side has the same deadline, and it or the call may say first that
// it has expired.
func withCause(ctx context.Context, err error) error {
	deadline, ok := ctx.Deadline()
	late := errors.Is(err, context.DeadlineExceeded) || err != nil && errdefs.IsDeadlineExceeded(errclass.FromRPC(err))
	if late && ok && time.Until(deadline) < clockMargin {
		<-ctx.Done()
	}
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// thaw has the agent thaw all processes. It is no error if there are none left.
func (c *container) thaw(ctx context.Context) error {
	turn := c.turn.Add(1)
	err := c.s.callAgent(ctx, func(ctx context.Context, a api.AgentService) error {
		ctx, cancel := c.s.freezeContext(ctx)
		defer cancel()
		_, err := a.Thaw(ctx, &api.ContainerRequest{ContainerId: c.id, Token: c.exchange.token, Turn: turn})
		return withCause(ctx, err)
	})
	if err == nil || errdefs.IsNotFound(err) || errors.Is(err, guest.ErrNoVM) {
		c.freezes.end(c)
		return nil
	}
	if hasStopped(c.current()) {
		return nil // perhaps together with its VM
	}
	return fmt.Errorf("thaw container %s: %w", c.id, err)
}

// The pauses between attempts to thaw a container that is owed a thaw.
const (
	firstThawPause = 100 * time.Millisecond
	lastThawPause  = 10 * time.Second
)

// collectThaw thaws a container that is owed a thaw, as soon as the agent can: a
// dump that has outlasted its deadline may still be at work on it. Nobody else
// would: the CRI has no Resume.
func (c *container) collectThaw() {
	c.s.background(func(ctx context.Context) {
		for pause := firstThawPause; ; pause = min(2*pause, lastThawPause) {
			timer := time.NewTimer(pause)
			select {
			case <-timer.C:
			case <-ctx.Done():
				timer.Stop()
				return // the agent thaws what has no owner
			}
			err := c.do(ctx, func(st state) error {
				if paused, ok := st.(pausedState); ok && paused.thawOwed {
					return paused.resume(ctx)
				}
				return nil // somebody else was first, or it has stopped
			})
			if err == nil {
				return
			}
			log.G(ctx).WithError(err).WithField("container", c.id).Warn("failed to thaw container after checkpoint, trying again")
		}
	})
}
