// SPDX-License-Identifier: Apache-2.0

// Package fake stands in for Kata and a guest in the shim's tests: a task
// service as Kata's shims serve it, their management socket, and an agent
// behind a VMM's hybrid vsock.
//
// Written against Kata Containers 4.1.0.
package fake

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/containerd/containerd/api/runtime/task/v2"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/kata"
)

// HypervisorPID is the pid that Kata reports for every process.
const HypervisorPID = 4711

// Kata is a task service that behaves like Kata's: a container that was killed
// is stopped, pids are the hypervisor's, and an unknown container is not found.
type Kata struct {
	Endpoint kata.Endpoint

	server *ttrpc.Server

	mu         sync.Mutex
	containers map[string]*task.StateResponse
	// killed are execs, by "container exec".
	killed map[string]bool
	// noStreams and unfollowed are containers, see [Kata.LoseStreams].
	noStreams, unfollowed map[string]bool

	calls    []string
	requests map[string]proto.Message
	before   map[string]func(context.Context) error
}

// NewTasks returns a service for the caller to serve.
func NewTasks() *Kata {
	return &Kata{
		containers: make(map[string]*task.StateResponse),
		killed:     make(map[string]bool),
		noStreams:  make(map[string]bool),
		unfollowed: make(map[string]bool),
		requests:   make(map[string]proto.Message),
		before:     make(map[string]func(context.Context) error),
	}
}

// NewKata serves until the test ends.
func NewKata(t *testing.T) *Kata {
	t.Helper()
	k := NewTasks()
	k.Endpoint = kata.Endpoint{Address: "unix://" + filepath.Join(t.TempDir(), "kata.sock"), Version: 2}
	var err error
	if k.server, err = ttrpc.NewServer(); err != nil {
		t.Fatal(err)
	}
	task.RegisterTTRPCTaskService(k.server, k)
	Serve(t, k.server, k.Endpoint.Path())
	return k
}

// Serve serves a ttrpc server on a unix socket until the test ends.
func Serve(t *testing.T, server *ttrpc.Server, path string) {
	t.Helper()
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		defer close(done)
		_ = server.Serve(ctx, l)
	}()
	t.Cleanup(func() {
		cancel()
		server.Close()
		<-done
	})
}

// Die stops the service, as if Kata's shim had been killed.
func (k *Kata) Die() { k.server.Close() }

// Before sets a function that runs first in a method, which fails with its
// error. Nil removes it.
func (k *Kata) Before(method string, f func(context.Context) error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.before[method] = f
}

// Calls lists the methods called so far, with their container and exec.
func (k *Kata) Calls() []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return append([]string(nil), k.calls...)
}

// Called reports whether Calls has a call.
func (k *Kata) Called(call string) bool {
	return slices.Contains(k.Calls(), call)
}

// Request returns the last request to a method.
func (k *Kata) Request(method string) proto.Message {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.requests[method]
}

// SetStatus changes a container's status.
func (k *Kata) SetStatus(id string, s tasktypes.Status) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if c := k.containers[id]; c != nil {
		c.Status = s
	}
}

// LoseStreams has the Start of a container fail as that of Kata's Go shim does
// once an engine that has given up has removed the container's FIFOs: its init
// runs, a Wait is answered, and nobody follows it
// (src/runtime/pkg/containerd-shim-v2/start.go).
func (k *Kata) LoseStreams(id string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.noStreams[id] = true
}

func (k *Kata) enter(ctx context.Context, method, id, exec string, req proto.Message) error {
	call := method + " " + id
	if exec != "" {
		call += " " + exec
	}
	k.mu.Lock()
	k.calls = append(k.calls, call)
	k.requests[method] = proto.Clone(req)
	f := k.before[method]
	k.mu.Unlock()
	if f != nil {
		return f(ctx)
	}
	return nil
}

// with calls f with a container's state.
func (k *Kata) with(id string, f func(*task.StateResponse)) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	c := k.containers[id]
	if c == nil {
		return errgrpc.ToGRPCf(errdefs.ErrNotFound, "container %s", id)
	}
	f(c)
	return nil
}

var empty = &emptypb.Empty{}

// Create implements the service.
func (k *Kata) Create(ctx context.Context, r *task.CreateTaskRequest) (*task.CreateTaskResponse, error) {
	if err := k.enter(ctx, "Create", r.ID, "", r); err != nil {
		return nil, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.containers[r.ID] = &task.StateResponse{ID: r.ID, Bundle: r.Bundle, Pid: HypervisorPID, Status: tasktypes.Status_CREATED, Terminal: r.Terminal}
	return &task.CreateTaskResponse{Pid: HypervisorPID}, nil
}

// Start implements the service.
func (k *Kata) Start(ctx context.Context, r *task.StartRequest) (*task.StartResponse, error) {
	if err := k.enter(ctx, "Start", r.ID, r.ExecID, r); err != nil {
		return nil, err
	}
	var failed error
	err := k.with(r.ID, func(s *task.StateResponse) {
		switch {
		case r.ExecID != "":
		case k.noStreams[r.ID]:
			s.Status = tasktypes.Status_RUNNING
			k.unfollowed[r.ID] = true
			failed = errors.New("open stdout: no such file or directory")
		case endsAtOnce(s.Bundle):
			s.Status = tasktypes.Status_STOPPED
		default:
			s.Status = tasktypes.Status_RUNNING
		}
	})
	if err == nil {
		err = failed
	}
	return &task.StartResponse{Pid: HypervisorPID}, err
}

// endsAtOnce reports whether a container's program only prints its version.
func endsAtOnce(bundle string) bool {
	data, err := os.ReadFile(filepath.Join(bundle, "config.json"))
	if err != nil {
		return false
	}
	var spec specs.Spec
	return json.Unmarshal(data, &spec) == nil && spec.Process != nil && slices.Contains(spec.Process.Args, "--version")
}

// State implements the service.
func (k *Kata) State(ctx context.Context, r *task.StateRequest) (*task.StateResponse, error) {
	if err := k.enter(ctx, "State", r.ID, r.ExecID, r); err != nil {
		return nil, err
	}
	var out *task.StateResponse
	err := k.with(r.ID, func(s *task.StateResponse) { out = proto.Clone(s).(*task.StateResponse) })
	if err == nil {
		out.ExecID = r.ExecID
		k.mu.Lock()
		defer k.mu.Unlock()
		if k.killed[r.ID+" "+r.ExecID] {
			out.Status = tasktypes.Status_STOPPED
		}
	}
	return out, err
}

// Kill implements the service.
func (k *Kata) Kill(ctx context.Context, r *task.KillRequest) (*emptypb.Empty, error) {
	if err := k.enter(ctx, "Kill", r.ID, r.ExecID, r); err != nil {
		return nil, err
	}
	return empty, k.with(r.ID, func(s *task.StateResponse) {
		switch {
		case r.Signal != 9, k.unfollowed[r.ID]:
		case r.ExecID == "":
			s.Status, s.ExitStatus = tasktypes.Status_STOPPED, 137
		default:
			k.killed[r.ID+" "+r.ExecID] = true
		}
	})
}

// Delete implements the service.
func (k *Kata) Delete(ctx context.Context, r *task.DeleteRequest) (*task.DeleteResponse, error) {
	if err := k.enter(ctx, "Delete", r.ID, r.ExecID, r); err != nil {
		return nil, err
	}
	out := &task.DeleteResponse{Pid: HypervisorPID}
	err := k.with(r.ID, func(s *task.StateResponse) { out.ExitStatus = s.GetExitStatus() })
	if err == nil && r.ExecID == "" {
		k.mu.Lock()
		defer k.mu.Unlock()
		delete(k.containers, r.ID)
	}
	return out, err
}

// Pids implements the service.
func (k *Kata) Pids(ctx context.Context, r *task.PidsRequest) (*task.PidsResponse, error) {
	if err := k.enter(ctx, "Pids", r.ID, "", r); err != nil {
		return nil, err
	}
	return &task.PidsResponse{Processes: []*tasktypes.ProcessInfo{{Pid: HypervisorPID}}}, nil
}

// Pause implements the service. To reach it with an agent there is an error.
func (k *Kata) Pause(ctx context.Context, r *task.PauseRequest) (*emptypb.Empty, error) {
	return empty, k.enter(ctx, "Pause", r.ID, "", r)
}

// Resume implements the service.
func (k *Kata) Resume(ctx context.Context, r *task.ResumeRequest) (*emptypb.Empty, error) {
	return empty, k.enter(ctx, "Resume", r.ID, "", r)
}

// Checkpoint implements the service, as Kata does.
func (k *Kata) Checkpoint(ctx context.Context, r *task.CheckpointTaskRequest) (*emptypb.Empty, error) {
	if err := k.enter(ctx, "Checkpoint", r.ID, "", r); err != nil {
		return nil, err
	}
	return nil, errgrpc.ToGRPCf(errdefs.ErrNotImplemented, "service Checkpoint")
}

// Exec implements the service.
func (k *Kata) Exec(ctx context.Context, r *task.ExecProcessRequest) (*emptypb.Empty, error) {
	return empty, k.enter(ctx, "Exec", r.ID, r.ExecID, r)
}

// ResizePty implements the service.
func (k *Kata) ResizePty(ctx context.Context, r *task.ResizePtyRequest) (*emptypb.Empty, error) {
	return empty, k.enter(ctx, "ResizePty", r.ID, r.ExecID, r)
}

// CloseIO implements the service.
func (k *Kata) CloseIO(ctx context.Context, r *task.CloseIORequest) (*emptypb.Empty, error) {
	return empty, k.enter(ctx, "CloseIO", r.ID, r.ExecID, r)
}

// Update implements the service.
func (k *Kata) Update(ctx context.Context, r *task.UpdateTaskRequest) (*emptypb.Empty, error) {
	return empty, k.enter(ctx, "Update", r.ID, "", r)
}

// Wait implements the service: it returns when its caller is gone.
func (k *Kata) Wait(ctx context.Context, r *task.WaitRequest) (*task.WaitResponse, error) {
	if err := k.enter(ctx, "Wait", r.ID, r.ExecID, r); err != nil {
		return nil, err
	}
	k.mu.Lock()
	failed := k.unfollowed[r.ID]
	k.mu.Unlock()
	if failed {
		return &task.WaitResponse{ExitStatus: 255}, nil
	}
	<-ctx.Done()
	return nil, ctx.Err()
}

// Stats implements the service.
func (k *Kata) Stats(ctx context.Context, r *task.StatsRequest) (*task.StatsResponse, error) {
	return &task.StatsResponse{}, k.enter(ctx, "Stats", r.ID, "", r)
}

// Connect implements the service.
func (k *Kata) Connect(ctx context.Context, r *task.ConnectRequest) (*task.ConnectResponse, error) {
	return &task.ConnectResponse{ShimPid: 1, TaskPid: HypervisorPID}, k.enter(ctx, "Connect", r.ID, "", r)
}

// Shutdown implements the service.
func (k *Kata) Shutdown(ctx context.Context, r *task.ShutdownRequest) (*emptypb.Empty, error) {
	return empty, k.enter(ctx, "Shutdown", r.ID, "", r)
}
