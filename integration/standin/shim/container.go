// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/api"
	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/hostspec"
	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/sandbox"
	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/stdio"
	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/way"
)

// unknownStatus is the exit status of a process whose status is lost.
const unknownStatus = 255

// container is a container of the sandbox.
type container struct {
	// mu is the Rust way's lock, one for each container. The Go way has one for
	// all.
	mu      sync.Mutex
	id      string
	kind    hostspec.Kind
	bundle  string
	spec    *specs.Spec
	mounted bool
	release sync.Once
	// released reports whether the container was removed from the guest.
	released atomic.Bool
	init     *process
	execs    map[string]*process
}

// process is a container's init, with an empty execID, or an exec.
type process struct {
	container string
	execID    string
	paths     stdio.Paths
	spec      *specs.Process // of an exec
	copy      *stdio.Copy    // nil before its start

	mu       sync.Mutex
	status   tasktypes.Status
	exit     uint32
	exitedAt time.Time
	exited   chan struct{}
	// notStarted is closed when the Start has failed, in the Go way.
	notStarted chan struct{}

	width, height uint32
}

func newProcess(container, execID string, paths stdio.Paths) *process {
	return &process{container: container, execID: execID, paths: paths, status: tasktypes.Status_CREATED, exited: make(chan struct{}), notStarted: make(chan struct{})}
}

func (p *process) set(status tasktypes.Status) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.status = status
}

// setExited is called once.
func (p *process) setExited(exit uint32, at time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.status, p.exit, p.exitedAt = tasktypes.Status_STOPPED, exit, at
	close(p.exited)
}

// setNotStarted is called under the container's lock.
func (p *process) setNotStarted() {
	select {
	case <-p.notStarted:
	default:
		close(p.notStarted)
	}
}

func (p *process) state() (status tasktypes.Status, exit uint32, at time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.status, p.exit, p.exitedAt
}

// startIO starts copying the process's streams.
func (p *process) startIO(w way.Way, namespace string, s *sandbox.Sandbox) error {
	id := p.container
	if p.execID != "" {
		id = p.execID
	}
	c, err := stdio.Start(w, namespace, id, p.paths, s.Streams(p.container, p.execID))
	if err != nil {
		return err
	}
	p.copy = c
	return nil
}

// wait returns once the process has exited and its output is copied.
func (p *process) wait(s *sandbox.Sandbox) uint32 {
	<-p.copy.Done()
	answer, err := s.Agent.WaitProcess(context.Background(), &api.ProcessRequest{Id: p.container, ExecId: p.execID})
	if err != nil {
		return unknownStatus
	}
	return answer.Status
}
