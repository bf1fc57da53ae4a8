package task

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/errdefs"

	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/bundle"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/guest"
)

// container is one container of the sandbox, from Create to Delete.
type container struct {
	s      *Service
	id     string
	bundle string
	kind   annotations.Kind

	// What its spec said when Create came.
	annotations map[string]string
	args        []string
	externals   []string
	hasHooks    bool
	terminal    bool

	exchange *exchange
	// source is the image set that the container is made from, if it is.
	source *source
	// agentErr is why the agent could not be reached after Create.
	agentErr error

	// restored: the container's processes are below a placeholder.
	restored atomic.Bool
	// abandoned is set once the container's Start was refused, and
	// abandonedDone closed.
	abandoned     atomic.Pointer[abandoned]
	abandonedDone chan struct{}
	// thawWanted: a Resume gave up waiting for the operation under way.
	thawWanted atomic.Bool
	// thawOwed: a checkpoint has ended, and its thaw could not be made.
	thawOwed atomic.Bool

	gate     gate
	launches launches
	// ops is held by what changes the state; see [container.do].
	ops chan struct{}

	mu    sync.Mutex
	state state

	waiter waiter
	// answers are the last that Kata gave to State, by exec id.
	answers sync.Map
	// creating is what State says as long as Kata creates the container.
	creating atomic.Pointer[task.StateResponse]
	// runningAt is when Kata last said that the first process runs, in
	// nanoseconds since 1970.
	runningAt atomic.Int64
	// execs are those into a restored container, by exec id.
	execs sync.Map
}

func newContainer(s *Service, r *task.CreateTaskRequest, spec *bundle.Spec, kind annotations.Kind) *container {
	c := &container{
		s: s, id: r.ID, bundle: r.Bundle, kind: kind,
		annotations: spec.Annotations,
		terminal:    r.Terminal,
		ops:         make(chan struct{}, 1),

		abandonedDone: make(chan struct{}),
	}
	if h := spec.Hooks; h != nil {
		//nolint:staticcheck // prestart hooks are deprecated and nerdctl's older versions write them
		c.hasHooks = len(h.Prestart)+len(h.CreateRuntime)+len(h.CreateContainer)+len(h.StartContainer)+len(h.Poststart)+len(h.Poststop) > 0
	}
	if spec.Process != nil {
		c.args = spec.Process.Args
	}
	c.state = createdState{c: c}
	c.launches.expect("")
	return c
}

// do runs a change of state, one at a time for each container. Calls that read
// do not come here, nor does what Kata does by itself.
func (c *container) do(ctx context.Context, change func(state) error) error {
	select {
	case c.ops <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("container %s: wait for the operation under way: %w", c.id, context.Cause(ctx))
	}
	defer func() {
		<-c.ops
		if c.thawWanted.Load() {
			c.settle(ctx)
		}
	}()
	return change(c.current())
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
	c.gate.open()
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

// freeze has the agent stop all processes.
func (c *container) freeze(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, c.s.cfg.FreezeTimeout, fmt.Errorf("freeze_timeout of %s has run out", c.s.cfg.FreezeTimeout))
	defer cancel()
	err := c.s.callAgent(ctx, func(ctx context.Context, a api.AgentService) error {
		_, err := a.Freeze(ctx, &api.ContainerRequest{ContainerId: c.id})
		return err
	})
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx) // which says why, as when Kata's shim has died
	}
	if err != nil {
		return fmt.Errorf("freeze container %s: %w", c.id, err)
	}
	return nil
}

// thaw has the agent let the processes go on; it is no error when there are
// none any more.
func (c *container) thaw(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, c.s.cfg.FreezeTimeout, fmt.Errorf("freeze_timeout of %s has run out", c.s.cfg.FreezeTimeout))
	defer cancel()
	err := c.s.callAgent(ctx, func(ctx context.Context, a api.AgentService) error {
		_, err := a.Thaw(ctx, &api.ContainerRequest{ContainerId: c.id})
		return err
	})
	if err == nil || errdefs.IsNotFound(err) || errors.Is(err, guest.ErrNoVM) {
		c.thawOwed.Store(false)
		return nil
	}
	if _, ended := c.current().(stoppedState); ended {
		return nil // with its VM, perhaps
	}
	return fmt.Errorf("thaw container %s: %w", c.id, err)
}

// isGone says whether an error means that there is nothing left to act on.
func isGone(err error) bool {
	return errdefs.IsNotFound(err) || errors.Is(err, errKataGone)
}
