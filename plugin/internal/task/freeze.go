// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/guest"
)

// freeze has the agent freeze all processes.
func (c *container) freeze(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, c.s.cfg.FreezeTimeout, fmt.Errorf("freeze_timeout of %s has expired", c.s.cfg.FreezeTimeout))
	defer cancel()
	err := c.s.callAgent(ctx, func(ctx context.Context, a api.AgentService) error {
		_, err := a.Freeze(ctx, &api.ContainerRequest{ContainerId: c.id})
		return err
	})
	if err != nil {
		return fmt.Errorf("freeze container %s: %w", c.id, err)
	}
	return nil
}

// thaw has the agent thaw all processes. It is no error if there are none left.
func (c *container) thaw(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, c.s.cfg.FreezeTimeout, fmt.Errorf("freeze_timeout of %s has expired", c.s.cfg.FreezeTimeout))
	defer cancel()
	err := c.s.callAgent(ctx, func(ctx context.Context, a api.AgentService) error {
		_, err := a.Thaw(ctx, &api.ContainerRequest{ContainerId: c.id})
		return err
	})
	if err == nil || errdefs.IsNotFound(err) || errors.Is(err, guest.ErrNoVM) {
		return nil
	}
	if hasStopped(c.current()) {
		return nil // perhaps together with its VM
	}
	return fmt.Errorf("thaw container %s: %w", c.id, err)
}
