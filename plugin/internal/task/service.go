// SPDX-License-Identifier: Apache-2.0

// Package task is the shim's task service: containerd's task API, forwarded
// to Kata's own shim except where a checkpoint or a restore needs more.
// [Service] serves one sandbox with its containers; the daemon (package
// plugin/internal/daemon) makes it and serves it.
//
// This file has the API's methods, in the API's order. What a call does beyond
// being forwarded is in the file of its name (start.go, kill.go, …); what a
// container may be asked at which point of its life is in lifecycle.go.
//
// Statements about the internals of others refer to Kata 4.1.0, containerd 2.1
// to 2.4, CRIU 4.2 and Linux 6.1 to 6.12.
package task

import (
	"context"
	"fmt"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/pkg/shutdown"
	"github.com/containerd/log"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-checkpoint/kata-checkpoint/internal/config"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/metrics"
	"github.com/kata-checkpoint/kata-checkpoint/internal/stopat"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/guest"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/kata"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/netgate"
)

// Events publishes events to containerd and reports those of Kata that the
// service needs. It is implemented by
// [github.com/kata-checkpoint/kata-checkpoint/plugin/internal/events.Relay].
type Events interface {
	events.Publisher
	OnExit(func(container, exec string))
	Hide(container string) bool
	Expect(container, exec string)
	Forget(container string)
}

// Options configures a service.
type Options struct {
	Config *config.Config
	// Namespace is containerd's; Sandbox is the ID of the container that the
	// shim was started for.
	Namespace, Sandbox string
	Downstream         kata.Endpoint
	Management         kata.Management
	Events             Events
	Shutdown           shutdown.Service
	// Unlink removes the sockets, so that a container of the same name can be
	// started as soon as Shutdown has been answered.
	Unlink func()
	// EndKata kills a Kata shim that does not shut down, and its VM.
	EndKata func() error
	// ProtectShare prevents Kata from deleting the files of containers whose root
	// file systems and volumes it has left mounted.
	ProtectShare func() error
	// SetWritable sets whether the guest can write to a directory of the host that
	// is mounted in one of its containers.
	SetWritable func(dir string, writable bool) error
	// Virtiofsd opens the process that serves the VM's files, see
	// [pidfd.OpenFile], or returns nil if there is none.
	Virtiofsd func() (*os.File, error)
}

// Service serves one sandbox.
type Service struct {
	cfg       *config.Config
	namespace string
	sandbox   string
	down      *downstream
	mgmt      kata.Management
	agent     *guest.Agent
	events    Events
	shutdown  shutdown.Service
	unlink    func()
	endKata   func() error
	protect   func() error
	// setWritable is Options.SetWritable.
	setWritable func(dir string, writable bool) error
	metrics     metrics.Spool
	// virtiofsd is Options.Virtiofsd.
	virtiofsd func() (*os.File, error)
	// hasAbandoned is set once a container has been abandoned.
	hasAbandoned atomic.Bool
	stops        stopat.Dir
	// overlapFrom is the size in bytes of image sets that are staged while Kata
	// creates the container.
	overlapFrom int64

	// vmBundle is the bundle in which the VM's process is recorded, or nil.
	vmBundle atomic.Pointer[string]
	// noPreDump has it logged once why there are no pre-dumps.
	noPreDump sync.Once
	// restarting is held while the agent is being restarted.
	restarting chan struct{}

	// base is done when the service stops; operations do not outlive it.
	base       context.Context
	cancel     context.CancelCauseFunc
	operations inProgress
	// files is done as well when the VM has lost its files, and with it all
	// operations.
	files     context.Context
	loseFiles context.CancelCauseFunc
	// idleTimer returns freed memory to the OS once no operation has run for
	// idleDelay.
	idleTimer *time.Timer

	dumps   dumps
	netgate netgateState
	nodeKey nodeKey

	mu         sync.RWMutex
	containers map[string]*container
	location   *kata.Guest
}

// New connects to Kata's shim. When that exits, the service shuts down.
func New(ctx context.Context, o Options) (*Service, error) {
	down, err := dialDownstream(ctx, o.Downstream)
	if err != nil {
		return nil, err
	}
	s := &Service{
		cfg: o.Config, namespace: o.Namespace, sandbox: o.Sandbox, down: down, mgmt: o.Management,
		events: o.Events, shutdown: o.Shutdown, unlink: o.Unlink, endKata: o.EndKata, protect: o.ProtectShare, setWritable: o.SetWritable, virtiofsd: o.Virtiofsd, containers: make(map[string]*container),
		stops: stopat.FromEnv(), overlapFrom: overlapFrom, netgate: netgateState{held: make(map[string][]netgate.Connection)}, restarting: make(chan struct{}, 1),
	}
	s.metrics = metrics.Spool{Dir: o.Config.MetricsDir}
	s.base, s.cancel = context.WithCancelCause(context.WithoutCancel(ctx))
	s.files, s.loseFiles = context.WithCancelCause(s.base)
	s.idleTimer = time.AfterFunc(idleDelay, debug.FreeOSMemory)
	s.agent = guest.New(s.dialAgent, s.onAgentLost)
	s.events.OnExit(s.onExit)
	s.shutdown.RegisterCallback(s.stop)
	go func() {
		<-down.gone
		log.G(ctx).Info("Kata's shim has exited")
		down.unlink()
		s.cancel(errKataGone)
		s.shutdown.Shutdown()
	}()
	return s, nil
}

// stop cancels the operations in progress, waits until they have cleaned up,
// and closes the connections.
func (s *Service) stop(ctx context.Context) error {
	s.cancel(errclass.Unavailable(errcode.ShuttingDown, "the shim is shutting down"))
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.operations.wait()
		s.idleTimer.Stop()
		s.agent.Close()
		s.down.client.Close()
		s.removeExchanges(ctx)
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("operations in progress did not finish: %w", ctx.Err())
	}
}

// removeExchanges removes the exchange directories of the containers that Kata has
// not deleted, once its shim has exited: containerd may not know them any longer,
// and then nobody else would.
func (s *Service) removeExchanges(ctx context.Context) {
	select {
	case <-s.down.gone:
	default:
		return // the shim's delete does it, which ends Kata first
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, c := range s.containers {
		if !c.exchange.present() {
			continue
		}
		if err := c.exchange.remove(); err != nil {
			log.G(ctx).WithError(err).WithField("container", id).Error("failed to clean up a container that was not deleted")
		}
	}
}

// protectShare is called after each Create of Kata's, failed or not: when a
// container that was never started, its VM or Kata's shim ends, Kata may leave
// the container's files mounted in its share and then delete them.
func (s *Service) protectShare(ctx context.Context, id string) {
	if err := s.protect(); err != nil {
		log.G(ctx).WithError(err).WithField("container", id).Error("failed to protect the container's files: Kata may delete them if the container is never started")
	}
}

// The task API, in its order. A call for a container that this shim did not
// create is Kata's.

// State reports the state of a container or an exec.
func (s *Service) State(ctx context.Context, r *task.StateRequest) (*task.StateResponse, error) {
	if c := s.container(r.ID); c != nil {
		return c.report(ctx, r)
	}
	resp := &task.StateResponse{}
	return resp, s.forward(ctx, "State", r, resp)
}

// Create prepares a container, from an image set if it is a restore, and has
// Kata create it.
func (s *Service) Create(ctx context.Context, r *task.CreateTaskRequest) (*task.CreateTaskResponse, error) {
	return s.create(ctx, r)
}

// Start starts a container's init, which includes the restore, or an exec.
func (s *Service) Start(ctx context.Context, r *task.StartRequest) (*task.StartResponse, error) {
	if c := s.container(r.ID); c != nil {
		return c.start(ctx, r)
	}
	resp := &task.StartResponse{}
	return resp, s.forward(ctx, "Start", r, resp)
}

// Delete deletes a container or an exec, and what the shim kept of it.
func (s *Service) Delete(ctx context.Context, r *task.DeleteRequest) (*task.DeleteResponse, error) {
	if c := s.container(r.ID); c != nil {
		return c.delete(ctx, r)
	}
	resp := &task.DeleteResponse{}
	return resp, s.forward(ctx, "Delete", r, resp)
}

// Pids lists a container's processes on the host, of which Kata has one.
func (s *Service) Pids(ctx context.Context, r *task.PidsRequest) (*task.PidsResponse, error) {
	if c := s.container(r.ID); c != nil {
		return c.pids(ctx, r)
	}
	resp := &task.PidsResponse{}
	return resp, s.forward(ctx, "Pids", r, resp)
}

// Pause freezes a container.
func (s *Service) Pause(ctx context.Context, r *task.PauseRequest) (*emptypb.Empty, error) {
	if c := s.container(r.ID); c != nil {
		return &emptypb.Empty{}, c.pause(ctx)
	}
	return s.forwardEmpty(ctx, "Pause", r)
}

// Resume thaws a container.
func (s *Service) Resume(ctx context.Context, r *task.ResumeRequest) (*emptypb.Empty, error) {
	if c := s.container(r.ID); c != nil {
		return &emptypb.Empty{}, c.resume(ctx)
	}
	return s.forwardEmpty(ctx, "Resume", r)
}

// Checkpoint writes an image set of a container.
func (s *Service) Checkpoint(ctx context.Context, r *task.CheckpointTaskRequest) (*emptypb.Empty, error) {
	c, err := s.requireContainer(r.ID)
	if err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, c.checkpoint(ctx, r)
}

// Kill signals a container or an exec.
func (s *Service) Kill(ctx context.Context, r *task.KillRequest) (*emptypb.Empty, error) {
	if c := s.container(r.ID); c != nil {
		return c.kill(ctx, r)
	}
	return s.forwardEmpty(ctx, "Kill", r)
}

// Exec adds an exec to a container, without starting it.
func (s *Service) Exec(ctx context.Context, r *task.ExecProcessRequest) (*emptypb.Empty, error) {
	s.events.Expect(r.ID, r.ExecID)
	if c := s.container(r.ID); c != nil {
		return c.exec(ctx, r)
	}
	return s.forwardEmpty(ctx, "Exec", r)
}

// ResizePty is Kata's.
func (s *Service) ResizePty(ctx context.Context, r *task.ResizePtyRequest) (*emptypb.Empty, error) {
	return s.forwardEmpty(ctx, "ResizePty", r)
}

// CloseIO closes the stdin of a container or an exec.
func (s *Service) CloseIO(ctx context.Context, r *task.CloseIORequest) (*emptypb.Empty, error) {
	return s.closeIO(ctx, r)
}

// Update is Kata's.
func (s *Service) Update(ctx context.Context, r *task.UpdateTaskRequest) (*emptypb.Empty, error) {
	return s.forwardEmpty(ctx, "Update", r)
}

// Wait returns the exit status of a container or an exec once it has exited.
func (s *Service) Wait(ctx context.Context, r *task.WaitRequest) (*task.WaitResponse, error) {
	if c := s.container(r.ID); c != nil {
		return c.wait(ctx, r)
	}
	resp := &task.WaitResponse{}
	return resp, s.forward(ctx, "Wait", r, resp)
}

// Stats is Kata's.
func (s *Service) Stats(ctx context.Context, r *task.StatsRequest) (*task.StatsResponse, error) {
	resp := &task.StatsResponse{}
	return resp, s.forward(ctx, "Stats", r, resp)
}

// Connect returns the PIDs of the shim and the container.
func (s *Service) Connect(ctx context.Context, r *task.ConnectRequest) (*task.ConnectResponse, error) {
	if c := s.container(r.ID); c != nil {
		return c.connect(ctx, r)
	}
	resp := &task.ConnectResponse{}
	return resp, s.forward(ctx, "Connect", r, resp)
}

// Shutdown ends the shim once Kata's shim has ended.
func (s *Service) Shutdown(ctx context.Context, r *task.ShutdownRequest) (*emptypb.Empty, error) {
	return s.shutDown(ctx, r)
}

// The methods must be those of containerd's API.
var _ task.TTRPCTaskService = (*Service)(nil)
