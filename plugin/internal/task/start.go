// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"fmt"

	"github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
)

// claim has the agent withdraw the exchange mount from a created container.
func (c *container) claim(ctx context.Context) error {
	if c.agentErr != nil {
		// Create has waited for it already: one more attempt.
		if err := c.s.agent.Connect(ctx); err != nil {
			return c.agentErr
		}
	}
	return c.s.agent.CallIdempotent(ctx, func(ctx context.Context, a api.AgentService) error {
		_, err := a.Adopt(ctx, &api.AdoptRequest{ContainerId: c.id, ExchangeDestination: api.ExchangeDestination, Token: c.exchange.token, Guarded: true, Owner: c.s.agent.Owner()})
		return err
	})
}

// start starts a container's init or one of its execs.
func (c *container) start(ctx context.Context, r *task.StartRequest) (*task.StartResponse, error) {
	if r.ExecID != "" {
		return c.startExec(ctx, r)
	}
	var resp *task.StartResponse
	err := c.do(ctx, func(st state) (err error) {
		resp, err = st.start(ctx, r)
		return err
	})
	c.starts.done("", err == nil)
	return resp, err
}

// startInit starts a created container, but only after the exchange mount was
// withdrawn from it, so that no workload ever sees it.
func (c *container) startInit(ctx context.Context, r *task.StartRequest) (*task.StartResponse, error) {
	ctx, end := c.s.operation(ctx)
	defer end()
	if err := c.claim(ctx); err != nil {
		return c.startWithoutAgent(ctx, r, err)
	}
	if c.source != nil {
		return c.startRestored(ctx, r)
	}
	resp, err := c.startInKata(ctx, r)
	if err != nil {
		return nil, errclass.Join(err, c.endFailedStart(ctx))
	}
	c.transition(runningState{c: c})
	if c.preDumps > 0 || c.s.cfg.LoadCRIUAtStart {
		c.s.background(func(ctx context.Context) { c.s.checkCRIU(ctx) })
	}
	return resp, nil
}

// startWithoutAgent starts a container that cannot be checkpointed, if the
// configuration permits it.
func (c *container) startWithoutAgent(ctx context.Context, r *task.StartRequest, reason error) (*task.StartResponse, error) {
	if !c.s.cfg.AgentOptional || c.source != nil {
		c.abandon(ctx)
		return nil, errclass.With(errdefs.ErrFailedPrecondition, fmt.Errorf("start container %s: %w", c.id, c.explain(reason)))
	}
	// The mount is still in the container. Nothing can be written through it once
	// its directory is deleted.
	if err := c.exchange.remove(); err != nil {
		c.abandon(ctx)
		return nil, fmt.Errorf("start container %s: %w", c.id, err)
	}
	log.G(ctx).WithError(reason).WithField("container", c.id).Warn("starting container without an agent: it cannot be checkpointed")
	resp, err := c.startInKata(ctx, r)
	if err != nil {
		return nil, errclass.Join(err, c.endFailedStart(ctx))
	}
	c.transition(unmanagedState{c: c, reason: c.explain(reason)})
	return resp, nil
}
