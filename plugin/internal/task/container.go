package task

import (
	"sync"
	"sync/atomic"

	"github.com/containerd/containerd/api/runtime/task/v2"

	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/bundle"
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

	lifecycle

	execGate execGate
	starts   startBarrier
	waiter   waiter

	// answers are the last that Kata gave to State, by exec id.
	stateCache sync.Map
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
		lifecycle:   newLifecycle(),
	}
	if h := spec.Hooks; h != nil {
		//nolint:staticcheck // prestart hooks are deprecated and nerdctl's older versions write them
		c.hasHooks = len(h.Prestart)+len(h.CreateRuntime)+len(h.CreateContainer)+len(h.StartContainer)+len(h.Poststart)+len(h.Poststop) > 0
	}
	if spec.Process != nil {
		c.args = spec.Process.Args
	}
	c.starts.expect("")
	return c
}

// container looks up a container that Create has made, nil otherwise.
func (s *Service) container(id string) *container {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.containers[id]
}

// known is container for calls that cannot be forwarded.
func (s *Service) requireContainer(id string) (*container, error) {
	if c := s.container(id); c != nil {
		return c, nil
	}
	return nil, errclass.NotFound("container %s is not known", id)
}

func (s *Service) add(c *container) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.containers[c.id] = c
}

func (s *Service) remove(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.containers, id)
}

// exited is told by the relay.
func (s *Service) onExit(id, exec string) {
	if c := s.container(id); c != nil && exec == "" {
		c.stopped()
	}
}
