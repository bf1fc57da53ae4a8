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
	uctx, cancel := cleanupContext(ctx)
	defer cancel()
	c.s.events.Hide(c.id) // Kata's TaskDelete would come before the exit
	// Kata's Go shim refuses it, which its Delete makes up for.
	if err := c.s.down.kill(uctx, &task.KillRequest{ID: c.id, Signal: uint32(syscall.SIGKILL), All: true}); err != nil {
		log.G(ctx).WithError(err).WithField("container", c.id).Debug("kill a container that has not started")
	}
	resp := &task.DeleteResponse{}
	if err := c.s.down.callNative(uctx, "Delete", &task.DeleteRequest{ID: c.id}, resp); err != nil && !isGone(err) {
		log.G(ctx).WithError(err).WithField("container", c.id).Error("delete a container that could not be started")
	}
	a := &abandoned{pid: resp.GetPid(), at: time.Now(), done: c.abandonedDone}
	c.abandoned.Store(a)
	c.s.hasAbandoned.Store(true)
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
	uctx, cancel := cleanupContext(ctx)
	defer cancel()
	err := c.s.down.callNative(uctx, "Start", r, &task.StartResponse{})
	if err == nil {
		err = c.killAndWait(uctx)
	}
	if err != nil {
		log.G(ctx).WithError(err).WithField("container", c.id).Warn("end a placeholder")
		c.abandon(ctx)
	}
}

func (a *abandoned) state(c *container) *task.StateResponse {
	out := &task.StateResponse{}
	if last, ok := c.stateCache.Load(""); ok {
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
