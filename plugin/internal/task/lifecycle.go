package task

import (
	"context"
	"errors"
	"fmt"
	"time"

	eventsapi "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/containerd/v2/core/runtime"
	"github.com/containerd/log"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
)

// state is where a container is in its life. What a state does not offer is an
// error there, so that no call can be made at the wrong time.
type state interface {
	// start is the first process's; execs start in [Service.startExec].
	start(context.Context, *task.StartRequest) (*task.StartResponse, error)
	pause(context.Context) error
	resume(context.Context) error
	checkpoint(context.Context, *checkpointRequest) error
	// frozen: Kata says that the container runs, and it does not.
	frozen() bool
}

// The order is created, running, then paused and running again any number of
// times, checkpointing from either of the two, and stopped. A container
// without an agent is unmanaged from Start on, or always if it is the sandbox's.

// createdState waits for Start.
type createdState struct{ c *container }

func (s createdState) start(ctx context.Context, r *task.StartRequest) (*task.StartResponse, error) {
	return s.c.startInit(ctx, r)
}

func (s createdState) pause(context.Context) error {
	return errclass.Precondition("container %s has not been started and cannot be paused", s.c.id)
}

func (s createdState) resume(context.Context) error {
	return errclass.Precondition("container %s has not been started and cannot be resumed", s.c.id)
}

func (s createdState) checkpoint(context.Context, *checkpointRequest) error {
	return errclass.Precondition("container %s has not been started: only what runs can be checkpointed", s.c.id)
}

func (createdState) frozen() bool { return false }

// runningState is a container that the agent in the guest knows.
type runningState struct{ c *container }

func (s runningState) start(context.Context, *task.StartRequest) (*task.StartResponse, error) {
	return nil, errclass.Precondition("container %s has been started already", s.c.id)
}

func (s runningState) pause(ctx context.Context) error {
	c := s.c
	begin := time.Now()
	if err := c.s.ensureAgent(ctx); err != nil {
		return fmt.Errorf("pause container %s: %w", c.id, err)
	}
	c.s.checkCRIU(ctx)
	if err := c.execGate.close(ctx, c.s.cfg.ExecWaitTimeout); err != nil {
		return err
	}
	if err := c.freeze(ctx); err != nil {
		uctx, cancel := cleanupContext(ctx)
		defer cancel()
		err = errors.Join(err, c.thaw(uctx))
		c.execGate.open()
		return err
	}
	c.become(pausedState(s))
	c.publish(ctx, runtime.TaskPausedEventTopic, &eventsapi.TaskPaused{ContainerID: c.id})
	log.G(ctx).WithField("container", c.id).WithField("duration", time.Since(begin)).Info("paused")
	return nil
}

// resume is no error: an engine resumes after a checkpoint, whatever happened.
func (runningState) resume(context.Context) error { return nil }

func (s runningState) checkpoint(ctx context.Context, r *checkpointRequest) error {
	return s.c.runCheckpoint(ctx, s, r)
}

func (runningState) frozen() bool { return false }

// pausedState is a container that was paused by a call.
type pausedState struct{ c *container }

func (s pausedState) start(ctx context.Context, r *task.StartRequest) (*task.StartResponse, error) {
	return runningState(s).start(ctx, r)
}

func (s pausedState) pause(context.Context) error {
	return errclass.Precondition("container %s is paused already", s.c.id)
}

func (s pausedState) resume(ctx context.Context) error {
	c := s.c
	if err := c.thaw(ctx); err != nil {
		return err
	}
	c.become(runningState(s))
	c.execGate.open()
	c.publish(ctx, runtime.TaskResumedEventTopic, &eventsapi.TaskResumed{ContainerID: c.id})
	log.G(ctx).WithField("container", c.id).Info("resumed")
	return nil
}

func (s pausedState) checkpoint(ctx context.Context, r *checkpointRequest) error {
	return s.c.runCheckpoint(ctx, s, r)
}

func (pausedState) frozen() bool { return true }

// checkpointingState lasts as long as a checkpoint. Calls that change the
// state wait for its end before they see one, so the methods are hardly called.
type checkpointingState struct {
	c *container
	// isFrozen: the processes stand still.
	isFrozen bool
}

func (s checkpointingState) start(ctx context.Context, r *task.StartRequest) (*task.StartResponse, error) {
	return runningState{s.c}.start(ctx, r)
}

func (s checkpointingState) pause(context.Context) error  { return s.busy() }
func (s checkpointingState) resume(context.Context) error { return s.busy() }
func (s checkpointingState) checkpoint(context.Context, *checkpointRequest) error {
	return s.busy()
}

func (s checkpointingState) busy() error {
	return errclass.Precondition("a checkpoint of container %s is under way: wait for its end", s.c.id)
}

func (s checkpointingState) frozen() bool { return s.isFrozen }

// stoppedState is the end.
type stoppedState struct{ c *container }

func (s stoppedState) start(context.Context, *task.StartRequest) (*task.StartResponse, error) {
	return nil, errclass.Precondition("container %s has stopped", s.c.id)
}

func (s stoppedState) pause(context.Context) error {
	return errclass.Precondition("container %s has stopped and cannot be paused", s.c.id)
}

// resume is no error: a checkpoint that stops the container is followed by one.
func (stoppedState) resume(context.Context) error { return nil }

func (s stoppedState) checkpoint(context.Context, *checkpointRequest) error {
	return errclass.Precondition("container %s has stopped: only what runs can be checkpointed", s.c.id)
}

func (stoppedState) frozen() bool { return false }

// unmanagedState is a container that Kata alone looks after.
type unmanagedState struct {
	c *container
	// reason says why it cannot be checkpointed.
	reason error
}

func (s unmanagedState) start(ctx context.Context, r *task.StartRequest) (*task.StartResponse, error) {
	resp := &task.StartResponse{}
	return resp, s.c.s.forward(ctx, "Start", r, resp)
}

func (s unmanagedState) pause(ctx context.Context) error {
	return s.c.s.forward(ctx, "Pause", &task.PauseRequest{ID: s.c.id}, &emptypb.Empty{})
}

func (s unmanagedState) resume(ctx context.Context) error {
	return s.c.s.forward(ctx, "Resume", &task.ResumeRequest{ID: s.c.id}, &emptypb.Empty{})
}

func (s unmanagedState) checkpoint(context.Context, *checkpointRequest) error {
	return errclass.Precondition("container %s cannot be checkpointed: %w", s.c.id, s.reason)
}

// frozen: what Kata has paused it says itself.
func (unmanagedState) frozen() bool { return false }

func (c *container) publish(ctx context.Context, topic string, event any) {
	if err := c.s.events.Publish(ctx, topic, event); err != nil {
		log.G(ctx).WithError(err).WithField("container", c.id).Error("publish event")
	}
}

func (c *container) current() state {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.state
}

// become sets the next state, unless the container has stopped meanwhile.
func (c *container) become(next state) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ended := c.state.(stoppedState); !ended {
		c.state = next
	}
}

// stopped notes that the first process has ended.
func (c *container) stopped() {
	c.become(stoppedState{c: c})
	c.execGate.open()
}

// isFrozen says whether the container is to be shown as paused by us.
func (c *container) isFrozen() bool { return c.current().frozen() }

// managed says whether the agent in the guest knows the container.
func (c *container) managed() bool {
	switch c.current().(type) {
	case runningState, pausedState, checkpointingState:
		return true
	}
	return false
}
