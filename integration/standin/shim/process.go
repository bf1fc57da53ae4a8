// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"syscall"
	"time"

	eventstypes "github.com/containerd/containerd/api/events"
	task "github.com/containerd/containerd/api/runtime/task/v2"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/api"
	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/stdio"
	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/way"
)

// Start starts a container or an exec.
func (s *service) Start(ctx context.Context, r *task.StartRequest) (*task.StartResponse, error) {
	c, p, leave, err := s.enterProcess(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	defer leave()
	if r.ExecID != "" {
		if err := s.startExec(ctx, c, p); err != nil {
			return nil, err
		}
		return &task.StartResponse{Pid: s.sandbox.Pid()}, nil
	}
	if status, _, _ := p.state(); status != tasktypes.Status_CREATED {
		return nil, fmt.Errorf("start container %s, which is %s: %w", c.id, status, errdefs.ErrFailedPrecondition)
	}
	if err := s.startInit(ctx, c, p); err != nil {
		return nil, err
	}
	s.afterStart(ctx, c)
	s.events.Send(&eventstypes.TaskStart{ContainerID: c.id, Pid: s.sandbox.Pid()})
	s.follow(c, p)
	return &task.StartResponse{Pid: s.sandbox.Pid()}, nil
}

// startInit starts a container's init and the copies of its streams. If these
// cannot be opened, init is left running in the Go way, where a Wait is answered
// (src/runtime/pkg/containerd-shim-v2/start.go); in the Rust way it is stopped and
// its exit is not reported (src/runtime-rs/crates/runtimes/virt_container/src/
// container_manager/container.rs).
func (s *service) startInit(ctx context.Context, c *container, p *process) error {
	_, err := s.sandbox.Agent.StartContainer(ctx, &api.ContainerRequest{Id: c.id})
	running := err == nil
	if running {
		p.set(tasktypes.Status_RUNNING)
		err = p.startIO(s.way, s.namespace, s.sandbox)
	}
	switch {
	case err == nil:
	case s.way == way.Go:
		p.setNotStarted()
	case running:
		s.release(c)
		p.set(tasktypes.Status_STOPPED)
	}
	return err
}

func (s *service) startExec(ctx context.Context, c *container, p *process) error {
	if status, _, _ := c.init.state(); status != tasktypes.Status_RUNNING {
		return fmt.Errorf("exec in container %s, which is %s: %w", c.id, status, errdefs.ErrFailedPrecondition)
	}
	raw, err := json.Marshal(p.spec)
	if err != nil {
		return err
	}
	// The lock is held meanwhile: if the container's cgroup is frozen, until
	// the thaw, as with Kata.
	if _, err := s.sandbox.Agent.ExecProcess(ctx, &api.ExecProcessRequest{Id: c.id, ExecId: p.execID, Process: raw}); err != nil {
		return err
	}
	p.set(tasktypes.Status_RUNNING)
	if p.width != 0 && p.height != 0 {
		if err := s.resize(ctx, p); err != nil {
			return err
		}
	}
	if err := p.startIO(s.way, s.namespace, s.sandbox); err != nil {
		return err
	}
	if s.way == way.Go {
		s.events.Send(&eventstypes.TaskExecStarted{ContainerID: c.id, ExecID: p.execID, Pid: s.sandbox.Pid()})
	}
	s.follow(c, p)
	return nil
}

// follow waits for a started process.
func (s *service) follow(c *container, p *process) {
	if s.way == way.Rust {
		s.announceExit(c, p)
	}
	go func() {
		exit := p.wait(s.sandbox)
		at := time.Now()
		if s.way == way.Rust {
			// Kata's Rust shim cleans up first and reports the exit afterwards.
			if p.execID == "" {
				c.mu.Lock()
				s.release(c)
				c.mu.Unlock()
			}
			p.setExited(exit, at)
			return
		}
		s.mu.Lock()
		p.setExited(exit, at)
		s.teardown.Add(1)
		defer s.teardown.Done()
		s.sendExit(p)
		s.mu.Unlock()
		if p.execID != "" {
			return
		}
		if c.kind.OwnsSandbox() {
			s.releaseAll()
			s.endSandbox()
		} else {
			s.release(c)
		}
	}()
}

// release removes a container from the guest and the share. Kata's shims kill
// it first, and the Go shim waits for its exit again
// (src/runtime/virtcontainers/container.go; src/runtime-rs/crates/runtimes/
// virt_container/src/container_manager/container_inner.rs). Until then, the
// guest reports how its execs exited.
func (s *service) release(c *container) {
	c.release.Do(func() {
		ctx := context.Background()
		// Both fail if the guest is gone, as does the rest.
		_, _ = s.sandbox.Agent.SignalProcess(ctx, &api.SignalProcessRequest{Id: c.id, Signal: uint32(syscall.SIGKILL)})
		if s.way == way.Go {
			_, _ = s.sandbox.Agent.WaitProcess(ctx, &api.ProcessRequest{Id: c.id})
		}
		if err := s.sandbox.RemoveContainer(ctx, c.id); err != nil {
			log.L.WithError(err).WithField("container", c.id).Warn("failed to release container")
		}
		c.released.Store(true)
	})
}

// releaseAll runs before the VM is stopped in the Go way
// (src/runtime/virtcontainers/sandbox.go).
func (s *service) releaseAll() {
	s.mu.Lock()
	containers := slices.Collect(maps.Values(s.containers))
	s.mu.Unlock()
	for _, c := range containers {
		s.release(c)
	}
}

func (s *service) endSandbox() {
	s.sandbox.Stop(context.Background())
	if err := s.sandbox.Remove(); err != nil {
		log.L.WithError(err).Error("failed to stop sandbox")
	}
}

// announceExit is the Rust way's: an exit is reported once for each waiter.
func (s *service) announceExit(c *container, p *process) {
	sandbox := s.sandbox
	go func() {
		<-p.exited
		if p.execID == "" && c.kind.OwnsSandbox() {
			sandbox.Stop(context.Background())
		}
		s.sendExit(p)
	}()
}

func (s *service) sendExit(p *process) {
	_, exit, at := p.state()
	id := p.container
	if p.execID != "" {
		id = p.execID
	}
	s.events.Send(&eventstypes.TaskExit{
		ContainerID: p.container, ID: id, Pid: s.sandbox.Pid(), ExitStatus: exit, ExitedAt: timestamppb.New(at),
	})
}

// Wait returns when a process has exited. In the Rust way the engine's wait for
// the sandbox's first container stops the sandbox.
func (s *service) Wait(_ context.Context, r *task.WaitRequest) (*task.WaitResponse, error) {
	c, p, leave, err := s.enterProcess(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	leave()
	select {
	case <-p.exited:
	case <-p.notStarted:
		return &task.WaitResponse{ExitStatus: unknownStatus}, nil
	}
	if s.way == way.Rust && p.execID == "" && c.kind.OwnsSandbox() {
		s.endSandbox()
	}
	_, exit, at := p.state()
	return &task.WaitResponse{ExitStatus: exit, ExitedAt: timestamppb.New(at)}, nil
}

// Delete removes a process that has exited, or, in the Go way, kills it first.
func (s *service) Delete(ctx context.Context, r *task.DeleteRequest) (*task.DeleteResponse, error) {
	c, p, leave, err := s.enterProcess(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	defer leave()
	status, exit, at := p.state()
	answer := &task.DeleteResponse{Pid: s.sandbox.Pid(), ExitStatus: exit, ExitedAt: timestamppb.New(at)}
	if r.ExecID != "" {
		delete(c.execs, r.ExecID)
		return answer, nil
	}
	if s.way == way.Go {
		switch {
		case c.kind.OwnsSandbox():
		case status != tasktypes.Status_STOPPED:
			s.release(c)
		case !c.released.Load():
			// Kata reports the exit before it removes the container from the
			// guest.
			return nil, errors.New("Container not ready or stopped, impossible to delete") //nolint:staticcheck // Kata's text
		}
		s.events.Send(&eventstypes.TaskDelete{ContainerID: c.id, Pid: s.sandbox.Pid(), ExitStatus: exit, ExitedAt: answer.ExitedAt})
		delete(s.containers, c.id)
	} else {
		s.events.Send(&eventstypes.TaskDelete{ID: c.id, Pid: s.sandbox.Pid(), ExitStatus: exit})
		s.mu.Lock()
		delete(s.containers, c.id)
		s.mu.Unlock()
	}
	s.afterStop(ctx, c)
	s.unmountRootfs(c)
	return answer, nil
}

// Exec adds a process to a container.
func (s *service) Exec(_ context.Context, r *task.ExecProcessRequest) (*emptypb.Empty, error) {
	c, leave, err := s.enter(r.ID)
	if err != nil {
		return nil, err
	}
	defer leave()
	if _, ok := c.execs[r.ExecID]; ok && s.way == way.Go {
		return nil, fmt.Errorf("exec %s: %w", r.ExecID, errdefs.ErrAlreadyExists)
	}
	spec, err := execSpec(s.way, r.Spec)
	if err != nil {
		return nil, err
	}
	spec.Terminal = r.Terminal
	p := newProcess(c.id, r.ExecID, stdio.Paths{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal})
	p.spec = spec
	if spec.ConsoleSize != nil {
		p.width, p.height = uint32(spec.ConsoleSize.Width), uint32(spec.ConsoleSize.Height)
	}
	c.execs[r.ExecID] = p
	if s.way == way.Go {
		s.events.Send(&eventstypes.TaskExecAdded{ContainerID: c.id, ExecID: r.ExecID})
	}
	return &emptypb.Empty{}, nil
}

// execSpec returns the part of an exec's process that reaches the guest: no
// capabilities in either way, and neither rlimits nor no-new-privileges in the
// Go way.
func execSpec(w way.Way, process *anypb.Any) (*specs.Process, error) {
	if process == nil {
		return nil, fmt.Errorf("exec without a process: %w", errdefs.ErrInvalidArgument)
	}
	var p specs.Process
	if err := json.Unmarshal(process.Value, &p); err != nil {
		return nil, errors.Join(fmt.Errorf("read the exec's process: %w", errdefs.ErrInvalidArgument), err)
	}
	p.Capabilities = nil
	p.ApparmorProfile, p.SelinuxLabel = "", ""
	if w == way.Go {
		p.Rlimits = nil
		p.NoNewPrivileges = false
	}
	return &p, nil
}

// Kill signals a process. Without an exec id, SIGKILL goes to the whole
// container: the agent sees to that.
func (s *service) Kill(ctx context.Context, r *task.KillRequest) (*emptypb.Empty, error) {
	final := r.Signal == uint32(syscall.SIGKILL) || r.Signal == uint32(syscall.SIGTERM)
	_, p, leave, err := s.enterProcess(r.ID, r.ExecID)
	if err != nil {
		if s.way == way.Rust && final && errdefs.IsNotFound(err) {
			return &emptypb.Empty{}, nil
		}
		return nil, err
	}
	defer leave()
	if status, _, _ := p.state(); status == tasktypes.Status_STOPPED && final {
		return &emptypb.Empty{}, nil
	}
	execID := r.ExecID
	if s.way == way.Rust && r.All {
		execID = ""
	}
	if _, err := s.sandbox.Agent.SignalProcess(ctx, &api.SignalProcessRequest{Id: r.ID, ExecId: execID, Signal: r.Signal}); err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, nil
}

// State returns a process's state. Like all others it waits for the request
// that holds the lock.
func (s *service) State(_ context.Context, r *task.StateRequest) (*task.StateResponse, error) {
	c, p, leave, err := s.enterProcess(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	defer leave()
	status, exit, at := p.state()
	return &task.StateResponse{
		ID: c.id, Bundle: c.bundle, Pid: s.sandbox.Pid(), Status: status, ExecID: r.ExecID,
		Stdin: p.paths.Stdin, Stdout: p.paths.Stdout, Stderr: p.paths.Stderr, Terminal: p.paths.Terminal,
		ExitStatus: exit, ExitedAt: timestamppb.New(at),
	}, nil
}

// ResizePty sets a terminal's size. Before the start of an exec, the size is
// stored for it.
func (s *service) ResizePty(ctx context.Context, r *task.ResizePtyRequest) (*emptypb.Empty, error) {
	_, p, leave, err := s.enterProcess(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	defer leave()
	p.width, p.height = r.Width, r.Height
	if status, _, _ := p.state(); status == tasktypes.Status_CREATED && p.execID != "" {
		return &emptypb.Empty{}, nil
	}
	if err := s.resize(ctx, p); err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, nil
}

func (s *service) resize(ctx context.Context, p *process) error {
	_, err := s.sandbox.Agent.ResizeTerminal(ctx, &api.ResizeTerminalRequest{Id: p.container, ExecId: p.execID, Width: p.width, Height: p.height})
	return err
}

// CloseIO closes a process's stdin.
func (s *service) CloseIO(_ context.Context, r *task.CloseIORequest) (*emptypb.Empty, error) {
	_, p, leave, err := s.enterProcess(r.ID, r.ExecID)
	if err != nil {
		return nil, err
	}
	defer leave()
	if p.copy != nil {
		if err := p.copy.CloseStdin(); err != nil {
			return nil, fmt.Errorf("close stdin: %w", err)
		}
	}
	return &emptypb.Empty{}, nil
}

// Connect returns the pids.
func (s *service) Connect(context.Context, *task.ConnectRequest) (*task.ConnectResponse, error) {
	return &task.ConnectResponse{ShimPid: uint32(os.Getpid()), TaskPid: s.lockedPid()}, nil
}
