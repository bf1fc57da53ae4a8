// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"strings"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/bundle"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/kata"
)

// forgetTimeout bounds the notification of the agent about a deleted container,
// whose VM may be gone as well.
const forgetTimeout = time.Second

// How often Kata is asked to delete a container that it has not stopped yet, and
// the pauses between.
const (
	deleteTries = 20
	deletePause = 100 * time.Millisecond
)

// delete deletes an exec or a container, and what this shim has kept of it.
func (c *container) delete(ctx context.Context, r *task.DeleteRequest) (*task.DeleteResponse, error) {
	if s, ok := c.current().(abandonedState); ok && r.ExecID == "" {
		resp := s.delete(ctx)
		c.forget(ctx)
		return resp, nil
	}
	resp := &task.DeleteResponse{}
	answered := ask(&c.ending.deletion)
	err := c.forwardDelete(ctx, r, resp)
	answered()
	if err != nil && !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		return resp, err
	}
	if r.ExecID != "" {
		c.stateCache.Delete(r.ExecID)
		c.execs.Delete(r.ExecID)
		c.starts.forget(r.ExecID)
		return resp, err
	}
	c.forget(ctx)
	return resp, err
}

// forwardDelete has Kata delete an exec or a container. Kata's Go shim publishes an
// exit before it stops the container (4.1.0, wait.go), and a Delete meanwhile fails
// if it removes the container's directory while that is written to.
func (c *container) forwardDelete(ctx context.Context, r *task.DeleteRequest, resp *task.DeleteResponse) error {
	for try := 1; ; try++ {
		err := c.s.forward(ctx, "Delete", r, resp)
		if err == nil || try == deleteTries || !strings.Contains(err.Error(), unix.ENOTEMPTY.Error()) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(deletePause):
		}
	}
}

// forget cleans up after a container that Kata has deleted.
func (c *container) forget(ctx context.Context) {
	c.stopped()
	c.starts.forget("")
	c.s.remove(c.id)
	c.s.events.Forget(c.id)
	if c.exchange == nil {
		return
	}
	uctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), forgetTimeout)
	defer cancel()
	if err := c.s.agent.Notify(uctx, func(ctx context.Context, a api.AgentService) error {
		_, err := a.Forget(ctx, &api.ContainerRequest{ContainerId: c.id, Token: c.exchange.token})
		return err
	}); err != nil {
		log.G(ctx).WithError(err).WithField("container", c.id).Debug("failed to notify the agent of a deleted container")
	}
	err := c.exchange.remove()
	if c.source != nil {
		err = errclass.Join(err, bundle.EmptyRootfs(c.bundle), kata.SweepMount(c.s.sandbox, c.id, api.HelperPath))
	}
	if err != nil {
		log.G(ctx).WithError(err).WithField("container", c.id).Error("failed to clean up deleted container")
	}
}
