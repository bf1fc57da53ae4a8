package task

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/bundle"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/kata"
)

const (
	// forgetTimeout bounds what is said to the agent about a container that is
	// gone; its VM may be, too.
	forgetTimeout = time.Second
	// exitWait is how long Shutdown waits for a Kata that ends after its answer.
	exitWait = time.Second
)

// Delete removes an exec or a container, and what we kept of it.
func (s *Service) Delete(ctx context.Context, r *task.DeleteRequest) (*task.DeleteResponse, error) {
	resp := &task.DeleteResponse{}
	c := s.container(r.ID)
	if c != nil && r.ExecID == "" {
		if a := c.abandoned.Load(); a != nil {
			resp = a.delete(ctx, c)
			c.forget(ctx)
			return resp, nil
		}
	}
	err := s.pass(ctx, "Delete", r, resp)
	if c == nil || err != nil && !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		return resp, err
	}
	if r.ExecID != "" {
		c.answers.Delete(r.ExecID)
		c.execs.Delete(r.ExecID)
		c.launches.forget(r.ExecID)
		return resp, err
	}
	c.forget(ctx)
	return resp, err
}

// forget drops a container that Kata does not have any more.
func (c *container) forget(ctx context.Context) {
	c.stopped()
	c.launches.forget("")
	c.s.remove(c.id)
	c.s.events.Forget(c.id)
	if c.exchange == nil {
		return
	}
	uctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), forgetTimeout)
	defer cancel()
	if err := c.s.agent.Tell(uctx, func(ctx context.Context, a api.AgentService) error {
		_, err := a.Forget(ctx, &api.ContainerRequest{ContainerId: c.id})
		return err
	}); err != nil {
		log.G(ctx).WithError(err).WithField("container", c.id).Debug("the agent did not forget")
	}
	err := c.exchange.remove()
	if c.source != nil {
		err = errors.Join(err, bundle.EmptyRootfs(c.bundle), kata.SweepMount(c.s.sandbox, c.id, api.HelperPath))
	}
	if err != nil {
		log.G(ctx).WithError(err).WithField("container", c.id).Error("delete")
	}
}

// Shutdown ends this process when Kata's shim has ended, and with nothing else:
// containerd calls it after every Delete, and Kata stays while there are
// other containers.
func (s *Service) Shutdown(ctx context.Context, r *task.ShutdownRequest) (*emptypb.Empty, error) {
	resp := &emptypb.Empty{}
	err := s.down.call(ctx, "Shutdown", r, resp)
	switch {
	case errors.Is(err, ttrpc.ErrClosed):
		// Kata's Go shim ends before it answers. It is no error to containerd,
		// to which an answer with this one would be.
	case err != nil && s.givenUp.Load() && r.ID == s.sandbox:
		// Kata's Rust shim cannot remove the share of a sandbox with a container that
		// it was never asked to start, and would stay for ever
		// (src/runtime-rs/crates/resource/src/share_fs/virtio_fs_share_mount.rs).
		log.G(ctx).WithError(err).Warn("Kata's shim does not shut down and is ended")
		if err := s.endKata(); err != nil {
			return nil, fmt.Errorf("shut down: %w", err)
		}
		select {
		case <-s.down.gone:
		case <-time.After(exitWait):
		}
	case err != nil:
		return nil, err
	case r.Now || r.ID == s.sandbox:
		select {
		case <-s.down.gone:
		case <-time.After(exitWait):
			return resp, nil
		}
	default:
		return resp, nil
	}
	// Before the answer: a container of the same name may be started with it.
	s.down.unlink()
	s.unlink()
	s.shutdown.Shutdown()
	return resp, nil
}
