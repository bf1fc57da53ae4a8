// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"syscall"
	"time"

	eventsapi "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/containerd/v2/core/runtime"
	"github.com/containerd/log"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
)

// state is a point in a container's life. A call that a state does not allow
// is an error there, so that none can be made at the wrong time.
type state interface {
	name() string
	// start starts init; execs start in [container.startExec].
	start(context.Context, *task.StartRequest) (*task.StartResponse, error)
	pause(context.Context) error
	resume(context.Context) error
	checkpoint(context.Context, *checkpointRequest) error
	// kill does what a signal for init needs here, and reports whether that was
	// all: if not, Kata is to deliver it.
	kill(context.Context) (done bool, err error)
	// forwardsKill reports whether a signal for init is Kata's to deliver, even
	// while an operation is in progress.
	forwardsKill(signal uint32) bool
	// response is what State answers for init without asking Kata, or nil.
	response() *task.StateResponse
	// frozen reports whether Kata takes the container for running while its
	// processes are frozen.
	frozen() bool
	// paused reports whether State shows the container as paused, whether or not
	// its processes are frozen.
	paused() bool
}

// transitions lists the states that may follow each state. Any but the last two
// may be followed by stopped. A container without an agent is unmanaged from
// Start on, a pod's sandbox always.
var transitions = map[string][]string{
	"creating":      {"creating", "created", "unmanaged", "stopped"},
	"created":       {"running", "unmanaged", "ending", "stopped", "abandoned"},
	"ending":        {"stopped", "abandoned"},
	"running":       {"paused", "checkpointing", "stopped"},
	"paused":        {"paused", "running", "checkpointing", "stopped"},
	"checkpointing": {"checkpointing", "running", "paused", "stopped"},
	"unmanaged":     {"stopped"},
	// Kata may report the end of a container that is being abandoned.
	"stopped":   {"abandoned"},
	"abandoned": {},
}

// lifecycle is a container's state and what guards it.
//
// Operations, which are the calls that change the state, are made one at a
// time. An exit is none: it is reported at any time, from the relay of events
// or in an answer of Kata's, and the state is stopped from then on, whatever an
// operation in progress makes of it. So are calls that only read the state.
type lifecycle struct {
	// slot is held by the operation in progress; see [container.do].
	slot chan struct{}
	// abandoned is closed when the state becomes abandonedState.
	abandoned chan struct{}
	// exitReported is closed when Kata has reported init's exit by an event.
	exitReported chan struct{}
	exitOnce     sync.Once

	mu    sync.Mutex
	state state
	// resumePending: the caller of a Resume gave up before it was done. The
	// operation in progress, which may be any in any state, does it when it ends.
	resumePending bool
	// interrupt cancels the Start in progress; nil: there is none.
	interrupt context.CancelCauseFunc
}

func newLifecycle() lifecycle {
	return lifecycle{slot: make(chan struct{}, 1), abandoned: make(chan struct{}), exitReported: make(chan struct{})}
}

// do runs an operation, once the one in progress has ended.
func (c *container) do(ctx context.Context, operation func(state) error) error {
	select {
	case c.slot <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("container %s: wait for the operation in progress: %w", c.id, context.Cause(ctx))
	}
	defer func() {
		<-c.slot
		c.resumeIfIdle(ctx)
	}()
	return operation(c.current())
}

func (c *container) current() state {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.state
}

// transition is the one place where the state changes. It reports whether it
// did: a container that has stopped remains so, and a transition that is not in
// the table is a programming error and refused. The exec gate opens with every
// state but a frozen one.
func (c *container) transition(next state) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if creating, ok := c.state.(creatingState); ok {
		switch _, exited := next.(stoppedState); {
		case exited:
			// State is answered here until Kata's Create has ended.
			next = creating.exited()
		case creating.next.name() == "stopped":
			next = creating.next
		}
	}
	allowed := slices.Contains(transitions[c.state.name()], next.name())
	if allowed {
		c.state = next
		if next.name() == "abandoned" {
			close(c.abandoned)
		}
	} else if !hasStopped(c.state) {
		log.L.WithFields(log.Fields{"container": c.id, "from": c.state.name(), "to": next.name()}).Error("refused an illegal state transition")
	}
	if !c.state.frozen() {
		c.execGate.open()
	}
	return allowed
}

// stopped records that init has exited.
func (c *container) stopped() {
	c.transition(stoppedState{c: c})
	c.freezes.end(c)
}

// hasStopped reports whether a state is one of the last.
func hasStopped(s state) bool { return s.name() == "stopped" || s.name() == "abandoned" }

// isFrozen reports whether this shim has frozen the processes.
func (c *container) isFrozen() bool { return c.current().frozen() }

// managed reports whether the agent in the guest knows the container.
func (c *container) managed() bool {
	switch c.current().(type) {
	case runningState, pausedState, checkpointingState:
		return true
	}
	return false
}

// restored reports whether the container's processes are below a placeholder.
func (c *container) restored() bool {
	return c.source != nil && (c.managed() || hasStopped(c.current()))
}

// usual is what most states do.
type usual struct{}

func (usual) kill(context.Context) (bool, error) { return false, nil }
func (usual) forwardsKill(uint32) bool           { return true }
func (usual) response() *task.StateResponse      { return nil }
func (usual) frozen() bool                       { return false }
func (usual) paused() bool                       { return false }

// creatingState lasts until Kata's Create has ended. Create is an operation, so
// its methods that change the state are reached only after one that failed.
type creatingState struct {
	usual
	c *container
	// answer is what State answers, for Kata's Go shim answers nobody meanwhile.
	answer *task.StateResponse
	// next is the state after Create.
	next state
}

func (creatingState) name() string { return "creating" }

func (s creatingState) start(context.Context, *task.StartRequest) (*task.StartResponse, error) {
	return nil, s.failed()
}
func (s creatingState) pause(context.Context) error  { return s.failed() }
func (s creatingState) resume(context.Context) error { return s.failed() }
func (s creatingState) checkpoint(context.Context, *checkpointRequest) error {
	return s.failed()
}

func (s creatingState) failed() error {
	return errclass.Precondition(errcode.NotCreated, "container %s could not be created", s.c.id)
}

func (s creatingState) forwardsKill(signal uint32) bool { return s.next.forwardsKill(signal) }
func (s creatingState) response() *task.StateResponse   { return s.answer }

// exited is the state once the container's exit was reported.
func (s creatingState) exited() creatingState {
	s.next = stoppedState{c: s.c}
	return s
}

// createdState lasts until Start has succeeded or failed.
type createdState struct {
	usual
	c *container
}

func (createdState) name() string { return "created" }

func (s createdState) start(ctx context.Context, r *task.StartRequest) (*task.StartResponse, error) {
	return s.c.startInit(ctx, r)
}

func (s createdState) pause(context.Context) error {
	return errclass.Precondition(errcode.NotStarted, "container %s has not been started and cannot be paused", s.c.id)
}

func (s createdState) resume(context.Context) error {
	return errclass.Precondition(errcode.NotStarted, "container %s has not been started and cannot be resumed", s.c.id)
}

func (s createdState) checkpoint(context.Context, *checkpointRequest) error {
	return errclass.Precondition(errcode.NotStarted, "container %s has not been started: only a running container can be checkpointed", s.c.id)
}

// kill abandons the container: Kata would not report its end.
func (s createdState) kill(ctx context.Context) (bool, error) {
	uctx, cancel := cleanupContext(ctx)
	defer cancel()
	if _, err := s.c.s.down.state(uctx, s.c.id); uctx.Err() != nil {
		return true, fmt.Errorf("kill container %s: %w", s.c.id, err)
	}
	s.c.abandon(ctx)
	return true, nil
}

func (createdState) forwardsKill(signal uint32) bool { return signal != uint32(syscall.SIGKILL) }

// endingState is a container whose Start has failed, or was given up, from then until
// it has been ended: its init, or the placeholder, may be running in Kata.
type endingState struct {
	createdState
}

func (endingState) name() string { return "ending" }

func (s endingState) start(context.Context, *task.StartRequest) (*task.StartResponse, error) {
	return nil, errclass.Precondition(errcode.Started, "container %s could not be started and is being ended: delete it and create it again", s.c.id)
}

func (s endingState) kill(ctx context.Context) (bool, error) {
	uctx, cancel := cleanupContext(ctx)
	defer cancel()
	return true, s.c.end(uctx)
}

// runningState is a container that the agent in the guest knows.
type runningState struct {
	usual
	c *container
}

func (runningState) name() string { return "running" }

func (s runningState) start(context.Context, *task.StartRequest) (*task.StartResponse, error) {
	return nil, errStarted(s.c)
}

func errStarted(c *container) error {
	return errclass.Precondition(errcode.Started, "container %s has already been started", c.id)
}

func (s runningState) pause(ctx context.Context) error {
	c := s.c
	begin := time.Now()
	if err := c.s.ensureAgent(ctx); err != nil {
		return fmt.Errorf("pause container %s: %w", c.id, err)
	}
	canPreDump := c.s.checkCRIU(ctx)
	c.s.freezeDeferred(ctx, c)
	if c.defersPause(ctx, canPreDump) {
		c.deferPause(ctx, begin)
		return nil
	}
	if err := c.execGate.close(ctx, c.s.cfg.ExecWaitTimeout); err != nil {
		return err
	}
	if err := c.freeze(ctx); err != nil {
		uctx, cancel := cleanupContext(ctx)
		defer cancel()
		err = errclass.Join(err, c.thaw(uctx))
		c.execGate.open()
		return err
	}
	c.transition(pausedState{c: c, by: &pause{at: time.Now()}})
	c.publish(ctx, runtime.TaskPausedEventTopic, &eventsapi.TaskPaused{ContainerID: c.id})
	log.G(ctx).WithField("container", c.id).WithField("duration", time.Since(begin)).Info("paused container")
	return nil
}

// resume is no error: an engine resumes after a checkpoint, whatever happened.
func (runningState) resume(context.Context) error { return nil }

func (s runningState) checkpoint(ctx context.Context, r *checkpointRequest) error {
	return s.c.runCheckpoint(ctx, s, r)
}

// pausedState is a container that was paused by a call.
type pausedState struct {
	usual
	c *container
	// thawOwed: a checkpoint that froze the container has ended and could not
	// thaw it. [container.collectThaw] tries until it is done, and an agent that
	// comes back or a Resume may be first.
	thawOwed bool
	// by is the Pause, nil if there was none.
	by *pause
	// runs: the processes run although State reports the container as paused,
	// until the engine resumes it.
	runs bool
	// deferred: it runs because its memory is copied first if a checkpoint follows
	// soon. If none does, it is frozen.
	deferred bool
}

func (pausedState) name() string { return "paused" }

func (s pausedState) start(context.Context, *task.StartRequest) (*task.StartResponse, error) {
	return nil, errStarted(s.c)
}

func (s pausedState) pause(context.Context) error {
	return errclass.Precondition(errcode.Paused, "container %s is already paused", s.c.id)
}

func (s pausedState) resume(ctx context.Context) error {
	c := s.c
	if err := c.thaw(ctx); err != nil {
		return err
	}
	c.transition(runningState{c: c})
	c.publish(ctx, runtime.TaskResumedEventTopic, &eventsapi.TaskResumed{ContainerID: c.id})
	log.G(ctx).WithField("container", c.id).Info("resumed container")
	return nil
}

func (s pausedState) checkpoint(ctx context.Context, r *checkpointRequest) error {
	return s.c.runCheckpoint(ctx, s, r)
}

func (s pausedState) frozen() bool { return !s.runs }
func (pausedState) paused() bool   { return true }

// checkpointingState lasts as long as a checkpoint. A checkpoint is an
// operation, so that its methods are reached only by a second checkpoint, which
// does not wait for the first.
type checkpointingState struct {
	usual
	c *container
	// isFrozen: the processes are frozen, by this checkpoint or by a Pause
	// before it.
	isFrozen bool
	// isPaused: State reports the container as paused, because a Pause came before
	// the checkpoint and its Resume has not.
	isPaused bool
}

func (checkpointingState) name() string { return "checkpointing" }

func (s checkpointingState) start(context.Context, *task.StartRequest) (*task.StartResponse, error) {
	return nil, errStarted(s.c)
}

func (s checkpointingState) pause(context.Context) error  { return s.busy() }
func (s checkpointingState) resume(context.Context) error { return s.busy() }
func (s checkpointingState) checkpoint(context.Context, *checkpointRequest) error {
	return s.busy()
}

func (s checkpointingState) busy() error {
	return errclass.Precondition(errcode.Busy, "a checkpoint of container %s is in progress: wait for it to finish", s.c.id)
}

func (s checkpointingState) frozen() bool { return s.isFrozen }
func (s checkpointingState) paused() bool { return s.isFrozen || s.isPaused }

// stoppedState is a container whose init has exited.
type stoppedState struct {
	usual
	c *container
}

func (stoppedState) name() string { return "stopped" }

func (s stoppedState) start(context.Context, *task.StartRequest) (*task.StartResponse, error) {
	return nil, errclass.Precondition(errcode.Stopped, "container %s has stopped", s.c.id)
}

func (s stoppedState) pause(context.Context) error {
	return errclass.Precondition(errcode.Stopped, "container %s has stopped and cannot be paused", s.c.id)
}

// resume is no error: a checkpoint that stops the container is followed by one.
func (stoppedState) resume(context.Context) error { return nil }

func (s stoppedState) checkpoint(context.Context, *checkpointRequest) error {
	return errclass.Precondition(errcode.Stopped, "container %s has stopped: only a running container can be checkpointed", s.c.id)
}

// unmanagedState is a container that only Kata manages.
type unmanagedState struct {
	usual
	c *container
	// reason is why it cannot be checkpointed.
	reason error
}

func (unmanagedState) name() string { return "unmanaged" }

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
	return errclass.Precondition(errcode.NoAgent, "container %s cannot be checkpointed: %w", s.c.id, s.reason)
}

func (c *container) publish(ctx context.Context, topic string, event any) {
	if err := c.s.events.Publish(ctx, topic, event); err != nil {
		log.G(ctx).WithError(err).WithFields(log.Fields{"container": c.id, "topic": topic}).Error("failed to publish event")
	}
}
