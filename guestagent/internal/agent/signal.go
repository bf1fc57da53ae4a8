// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/pidfd"
)

// Signal implements the service. It takes no lock of operations: a signal
// reaches a container that is being checkpointed as well, as Kata's do.
func (a *Agent) Signal(_ context.Context, r *api.SignalRequest) (*emptypb.Empty, error) {
	c, err := a.running(r.GetContainerId())
	if err != nil {
		return nil, errclass.ToRPC(err)
	}
	sig := unix.Signal(r.GetSignal())
	if sig != unix.SIGSTOP && sig != unix.SIGCONT {
		return nil, errclass.ToRPC(errclass.Invalid(errcode.SignalNotOurs, "signal %d is Kata's to deliver", r.GetSignal()))
	}
	if c.Restored == nil {
		return nil, errclass.ToRPC(errcode.NotRestored.Errorf("container %s is not a restored one: %w", c.ID, errdefs.ErrFailedPrecondition))
	}
	if token := r.GetHelperToken(); token != "" {
		err = a.execs.signal(token, sig)
	} else {
		err = c.Restored.signal(sig)
	}
	if err != nil {
		return nil, errclass.ToRPC(fmt.Errorf("send %s to a process of container %s: %w", unix.SignalName(sig), c.ID, err))
	}
	return &emptypb.Empty{}, nil
}

// signal sends a signal to a process. That it has exited is [errdefs.ErrNotFound].
func (p process) signal(sig unix.Signal) error {
	fd, err := pidfd.Open(p.PID)
	if err != nil {
		return notFound(err)
	}
	defer unix.Close(fd)
	if !p.alive() { // the descriptor is of a later process
		return notFound(os.ErrProcessDone)
	}
	return notFound(pidfd.Signal(fd, sig))
}

// notFound gives the error of a process that has exited the class that the shim
// knows.
func notFound(err error) error {
	if errors.Is(err, os.ErrProcessDone) {
		return errclass.With(errdefs.ErrNotFound, err)
	}
	return err
}

// execs are the processes of the running execs into restored containers: a
// pidfd of each by its helper's token.
type execs struct {
	mu  sync.Mutex
	fds map[string]int
}

// add notes a process, which has not been reaped yet. It returns what forgets
// it again.
func (e *execs) add(token string, pid int) (forget func(), err error) {
	fd, err := pidfd.Open(pid)
	if err != nil {
		return func() {}, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.fds == nil {
		e.fds = make(map[string]int)
	}
	e.fds[token] = fd
	return func() {
		e.mu.Lock()
		defer e.mu.Unlock()
		delete(e.fds, token)
		unix.Close(fd)
	}, nil
}

// signal sends a signal to a process that was added.
func (e *execs) signal(token string, sig unix.Signal) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	fd, ok := e.fds[token]
	if !ok {
		return notFound(os.ErrProcessDone)
	}
	return notFound(pidfd.Signal(fd, sig))
}
