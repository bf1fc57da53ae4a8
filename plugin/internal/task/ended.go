package task

import (
	"context"
	"syscall"
	"time"

	eventsapi "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/containerd/v2/core/runtime"
	"github.com/containerd/containerd/v2/pkg/protobuf"
	"github.com/containerd/log"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
)

// statusNotStarted is the exit status of a container that never ran; engines
// show it for processes whose status is not known.
const statusNotStarted = 255

// abandoned is the end of a container whose Start was refused. Kata has it as
// created for ever then: its Go shim kills no container that has not started
// ("Sandbox not running"), its Rust shim does and lets nobody know, and no
// engine deletes a task that has not stopped. So Kata deletes it at once, and
// State, Wait, Kill and Delete are answered here, as runc's shim answers them
// for a process that has ended.
type abandoned struct {
	pid  uint32
	at   time.Time
	done chan struct{}
}

// abandon ends a container that Kata has not been asked to start.
func (c *container) abandon(ctx context.Context) {
	uctx, cancel := undo(ctx)
	defer cancel()
	c.s.events.Hide(c.id) // Kata's TaskDelete would come before the exit
	// Kata's Go shim refuses it, which its Delete makes up for.
	if err := c.s.down.kill(uctx, &task.KillRequest{ID: c.id, Signal: uint32(syscall.SIGKILL), All: true}); err != nil {
		log.G(ctx).WithError(err).WithField("container", c.id).Debug("kill a container that has not started")
	}
	resp := &task.DeleteResponse{}
	if err := c.s.down.own(uctx, "Delete", &task.DeleteRequest{ID: c.id}, resp); err != nil && !isGone(err) {
		log.G(ctx).WithError(err).WithField("container", c.id).Error("delete a container that could not be started")
	}
	a := &abandoned{pid: resp.GetPid(), at: time.Now(), done: c.abandonedDone}
	c.abandoned.Store(a)
	c.s.givenUp.Store(true)
	c.stopped()
	close(a.done)
	c.publish(ctx, runtime.TaskExitEventTopic, &eventsapi.TaskExit{
		ContainerID: c.id, ID: c.id, Pid: a.pid, ExitStatus: statusNotStarted, ExitedAt: protobuf.ToTimestamp(a.at),
	})
}

// endPlaceholder ends a container whose restore was refused the way in which
// Kata ends any other, VM included: its placeholder, which does nothing by
// itself, is started and killed.
func (c *container) endPlaceholder(ctx context.Context, r *task.StartRequest) {
	uctx, cancel := undo(ctx)
	defer cancel()
	err := c.s.down.own(uctx, "Start", r, &task.StartResponse{})
	if err == nil {
		err = c.kill(uctx)
	}
	if err != nil {
		log.G(ctx).WithError(err).WithField("container", c.id).Warn("end a placeholder")
		c.abandon(ctx)
	}
}

func (a *abandoned) state(c *container) *task.StateResponse {
	out := &task.StateResponse{}
	if last, ok := c.answers.Load(""); ok {
		out = proto.Clone(last.(*task.StateResponse)).(*task.StateResponse)
	}
	out.ID, out.Bundle, out.Status = c.id, c.bundle, statusStopped
	out.ExitStatus, out.ExitedAt = statusNotStarted, protobuf.ToTimestamp(a.at)
	return out
}

// delete answers what Kata has done already.
func (a *abandoned) delete(ctx context.Context, c *container) *task.DeleteResponse {
	out := &task.DeleteResponse{Pid: a.pid, ExitStatus: statusNotStarted, ExitedAt: protobuf.ToTimestamp(a.at)}
	c.publish(ctx, runtime.TaskDeleteEventTopic, &eventsapi.TaskDelete{ContainerID: c.id, Pid: out.Pid, ExitStatus: out.ExitStatus, ExitedAt: out.ExitedAt})
	return out
}

// Kill is forwarded, unless there is nothing left to kill. A container that has
// not been started and is to end is given up here: Kata lets nobody know.
func (s *Service) Kill(ctx context.Context, r *task.KillRequest) (*emptypb.Empty, error) {
	c := s.container(r.ID)
	if c.leavesKill(r) {
		return s.passEmpty(ctx, "Kill", r)
	}
	ended := false
	err := c.do(ctx, func(st state) error {
		if _, ended = st.(createdState); ended {
			c.abandon(ctx)
		}
		return nil
	})
	switch {
	case err != nil || ended:
		return &emptypb.Empty{}, err
	case c.abandoned.Load() != nil:
		return nil, errclass.NotFound("container %s has not been started: its process has ended", r.ID)
	}
	return s.passEmpty(ctx, "Kill", r)
}

// leavesKill says whether a Kill is for Kata alone; c is nil for a container
// that is not known here.
func (c *container) leavesKill(r *task.KillRequest) bool {
	if c == nil || r.ExecID != "" {
		return true
	}
	_, created := c.current().(createdState)
	return c.abandoned.Load() == nil && (!created || r.Signal != uint32(syscall.SIGKILL))
}
