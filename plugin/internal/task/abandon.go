// SPDX-License-Identifier: Apache-2.0

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

	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
)

// statusNotStarted is the exit status of a container that never ran; engines
// show it for processes whose status is not known.
const statusNotStarted = 255

// abandonedState is a container that was never started and never will be: its
// Start was refused or has failed, or it was killed before. In Kata it would
// remain created: the Go shim kills no container that has not started ("Sandbox
// not running"), the Rust shim does and reports no exit, and no engine deletes a
// task that has not stopped. So it is deleted in Kata at once, and State, Wait,
// Kill and Delete are answered here, as runc's shim answers them for a process
// that has exited.
type abandonedState struct {
	stoppedState
	pid uint32
	at  time.Time
}

func (abandonedState) name() string { return "abandoned" }

func (s abandonedState) kill(context.Context) (bool, error) {
	return true, errclass.NotFound(errcode.NeverStarted, "container %s was never started: it has no process to signal", s.c.id)
}

func (abandonedState) forwardsKill(uint32) bool { return false }

func (s abandonedState) response() *task.StateResponse {
	out := &task.StateResponse{}
	if last, ok := s.c.stateCache.Load(""); ok {
		out = proto.Clone(last.(*task.StateResponse)).(*task.StateResponse)
	}
	out.ID, out.Bundle, out.Status = s.c.id, s.c.bundle, statusStopped
	out.ExitStatus, out.ExitedAt = statusNotStarted, protobuf.ToTimestamp(s.at)
	return out
}

// wait answers a Wait for init.
func (s abandonedState) wait() *task.WaitResponse {
	return &task.WaitResponse{ExitStatus: statusNotStarted, ExitedAt: protobuf.ToTimestamp(s.at)}
}

// delete answers for the deletion that abandon has made in Kata.
func (s abandonedState) delete(ctx context.Context) *task.DeleteResponse {
	out := &task.DeleteResponse{Pid: s.pid, ExitStatus: statusNotStarted, ExitedAt: protobuf.ToTimestamp(s.at)}
	s.c.publish(ctx, runtime.TaskDeleteEventTopic, &eventsapi.TaskDelete{ContainerID: s.c.id, Pid: out.Pid, ExitStatus: out.ExitStatus, ExitedAt: out.ExitedAt})
	return out
}

// abandon gives up a container that Kata has not been asked to start, or has failed
// to, unless Kata has reported its exit.
func (c *container) abandon(ctx context.Context) {
	if !c.s.events.Hide(c.id) { // Kata's TaskDelete would come before the exit
		return
	}
	uctx, cancel := cleanupContext(ctx)
	defer cancel()
	logger := log.G(ctx).WithField("container", c.id)
	// Kata's Go shim refuses it, and its Delete makes up for that.
	if err := c.s.down.kill(uctx, &task.KillRequest{ID: c.id, Signal: uint32(syscall.SIGKILL), All: true}); err != nil {
		logger.WithError(err).Debug("failed to kill a container that was never started")
	}
	c.abandoning.Store(true)
	resp := &task.DeleteResponse{}
	if err := c.s.down.callNative(uctx, "Delete", &task.DeleteRequest{ID: c.id}, resp); err != nil && !isGone(err) {
		logger.WithError(err).Error("failed to delete a container that was never started")
	}
	s := abandonedState{stoppedState: stoppedState{c: c}, pid: resp.GetPid(), at: time.Now()}
	c.s.hasAbandoned.Store(true)
	c.transition(s)
	c.publish(ctx, runtime.TaskExitEventTopic, &eventsapi.TaskExit{
		ContainerID: c.id, ID: c.id, Pid: s.pid, ExitStatus: statusNotStarted, ExitedAt: protobuf.ToTimestamp(s.at),
	})
}

// stopPlaceholder ends a container whose restore was refused in the way in
// which Kata ends any other, VM included: it starts the placeholder, which does
// nothing on its own, and kills it.
func (c *container) stopPlaceholder(ctx context.Context, r *task.StartRequest) {
	uctx, cancel := cleanupContext(ctx)
	defer cancel()
	if _, err := c.startInKata(uctx, r); err != nil {
		log.G(ctx).WithError(err).WithField("container", c.id).Warn("failed to start placeholder, to stop it")
	}
	if err := c.endFailedStart(ctx); err != nil {
		log.G(ctx).WithError(err).WithField("container", c.id).Warn("failed to stop placeholder, trying again")
	}
}
