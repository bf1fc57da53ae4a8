// SPDX-License-Identifier: Apache-2.0

package task

import (
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/bundle"
)

// container is one container of the sandbox, from Create to Delete.
type container struct {
	s      *Service
	id     string
	bundle string
	kind   annotations.Kind

	// From the OCI spec at Create.
	annotations map[string]string
	args        []string
	externals   []string
	hasHooks    bool
	terminal    bool
	rights      *imageset.Rights
	// bounds are those of its processes.
	bounds *api.Rights

	// thawAt is the annotation's [annotations.AfterDump] or [annotations.AtResume],
	// or empty.
	thawAt string
	// preDumps is how often its memory is copied at most before a checkpoint freezes
	// it.
	preDumps int
	// rootIsFixed: nothing in it can write to its root file system.
	rootIsFixed bool

	exchange *exchange
	// source is the image set that the container is restored from, or nil.
	source *source
	// agentErr is why the agent was not reachable after Create, or nil.
	agentErr error

	lifecycle

	freezes freezes

	// turn is that of the last Freeze or Thaw that the agent was asked for.
	turn atomic.Uint64

	execGate execGate
	starts   startBarrier
	waiter   waiter
	// initStart is the Start that Kata was asked for, or nil.
	initStart atomic.Pointer[initStart]
	// abandoning: Kata is asked to delete the container, or has done so.
	abandoning atomic.Bool

	// stateCache holds Kata's last response to State by exec ID.
	stateCache sync.Map
	ending     ending
	// runningAt is when Kata last reported init as running.
	runningAt atomic.Pointer[time.Time]
	// execs holds the execs into a restored container by exec ID.
	execs sync.Map
}

func newContainer(s *Service, r *task.CreateTaskRequest, spec *bundle.Spec, kind annotations.Kind) *container {
	c := &container{
		s: s, id: r.ID, bundle: r.Bundle, kind: kind,
		annotations: spec.Annotations,
		terminal:    r.Terminal,
		rights:      rightsIn(spec.Spec),
		bounds:      rightsOf(spec.Process),
		lifecycle:   newLifecycle(),
	}
	if h := spec.Hooks; h != nil {
		//nolint:staticcheck // prestart hooks are deprecated, but older versions of nerdctl write them
		c.hasHooks = len(h.Prestart)+len(h.CreateRuntime)+len(h.CreateContainer)+len(h.StartContainer)+len(h.Poststart)+len(h.Poststop) > 0
	}
	if spec.Process != nil {
		c.args = spec.Process.Args
	}
	c.bounds.Execs = true
	c.rootIsFixed = spec.Root != nil && spec.Root.Readonly && !mayRemount(spec.Process)
	c.starts.expect("")
	return c
}

// mayRemount reports whether a process can have the capability to make a file
// system writable.
func mayRemount(p *specs.Process) bool {
	if p == nil || p.Capabilities == nil {
		return true
	}
	c := p.Capabilities
	all := upper(slices.Concat(c.Bounding, c.Permitted, c.Effective, c.Inheritable, c.Ambient))
	return slices.Contains(all, "CAP_SYS_ADMIN")
}

// container returns the container with an ID, or nil if this shim has not
// created it.
func (s *Service) container(id string) *container {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.containers[id]
}

// requireContainer is container for calls that cannot be forwarded to Kata.
func (s *Service) requireContainer(id string) (*container, error) {
	if c := s.container(id); c != nil {
		return c, nil
	}
	return nil, errclass.NotFound(errcode.NoContainer, "container %s does not exist", id)
}

// all returns the containers.
func (s *Service) all() []*container {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return slices.Collect(maps.Values(s.containers))
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

// onExit is called by the relay for each TaskExit event of Kata's.
func (s *Service) onExit(id, exec string) {
	if c := s.container(id); c != nil && exec == "" {
		c.exitOnce.Do(func() { close(c.exitReported) })
		c.stopped()
	}
}
