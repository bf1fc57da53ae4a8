// Package task is the shim's task service: containerd's task API, forwarded
// call by call to Kata's own shim, except where a checkpoint or a restore
// needs more. [Service] is one sandbox with its containers; the daemon
// (package plugin/internal/daemon) serves it. What is intercepted: Create, Start, Pause,
// Resume, Checkpoint, Exec, State, Delete and Shutdown, a file each.
package task

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/pkg/shutdown"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/config"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/stopat"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/bundle"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/guest"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/kata"
)

// Events carries events to containerd, and back what the service has to know.
// [github.com/kata-checkpoint/kata-checkpoint/plugin/internal/events.Relay] is one.
type Events interface {
	events.Publisher
	OnExit(func(container, exec string))
	Hide(container string)
	Expect(container, exec string)
	Forget(container string)
}

// Options is what a service is made from.
type Options struct {
	Config *config.Config
	// Namespace is containerd's; Sandbox is the id of the container that the
	// shim was started for.
	Namespace, Sandbox string
	Downstream         kata.Endpoint
	Management         kata.Management
	Events             Events
	Shutdown           shutdown.Service
	// Unlink removes the sockets, so that a container of the same name can
	// start at once after Shutdown was answered.
	Unlink func()
	// EndKata kills a Kata that does not shut down, VM included.
	EndKata func() error
	// ProtectShare keeps Kata from removing the files of containers whose root
	// file systems and volumes it has left mounted.
	ProtectShare func() error
}

// stopEnv names the directory by which tests stop operations at their phases.
const stopEnv = "KATA_CHECKPOINT_STOP_DIR"

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
	// givenUp: a container was abandoned.
	givenUp atomic.Bool
	stops   stopat.Dir

	// vmBundle is where the VM's process is noted, once there is one.
	vmBundle atomic.Pointer[string]
	// reviving is held by whoever starts the agent again.
	reviving chan struct{}

	// base ends when the service stops; operations do not outlive it.
	base   context.Context
	cancel context.CancelCauseFunc
	wg     sync.WaitGroup
	// rest is stopped by the beginning of an operation, and started anew by the end.
	rest *time.Timer

	mu         sync.RWMutex
	containers map[string]*container
	location   *kata.Guest
}

// New connects to Kata's shim. The service ends by itself, by way of Shutdown,
// once Kata's shim has.
func New(ctx context.Context, o Options) (*Service, error) {
	down, err := dialDownstream(ctx, o.Downstream)
	if err != nil {
		return nil, err
	}
	s := &Service{
		cfg: o.Config, namespace: o.Namespace, sandbox: o.Sandbox, down: down, mgmt: o.Management,
		events: o.Events, shutdown: o.Shutdown, unlink: o.Unlink, endKata: o.EndKata, protect: o.ProtectShare, containers: make(map[string]*container),
		stops: stopat.Dir(os.Getenv(stopEnv)), reviving: make(chan struct{}, 1),
	}
	s.base, s.cancel = context.WithCancelCause(context.WithoutCancel(ctx))
	s.rest = time.AfterFunc(restAfter, debug.FreeOSMemory)
	s.agent = guest.New(s.dialAgent, o.Namespace+"/"+o.Sandbox, s.agentLost)
	s.events.OnExit(s.exited)
	s.shutdown.RegisterCallback(s.stop)
	go func() {
		<-down.gone
		log.G(ctx).Info("Kata's shim has ended")
		down.unlink()
		s.cancel(errKataGone)
		s.shutdown.Shutdown()
	}()
	return s, nil
}

// stop waits for what is under way to be undone, and closes the connections.
func (s *Service) stop(ctx context.Context) error {
	s.cancel(errclass.Unavailable("the shim is shutting down"))
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.wg.Wait()
		s.rest.Stop()
		s.agent.Close()
		s.down.client.Close()
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("operations under way did not end: %w", ctx.Err())
	}
}

// operation returns a context for something longer than a forwarded call: it
// ends with the caller's, with the service, and after checkpoint_timeout.
func (s *Service) operation(ctx context.Context) (context.Context, func()) {
	timeout := s.cfg.OpTimeout
	s.wg.Add(1)
	s.rest.Stop()
	ctx, cancel := context.WithCancelCause(ctx)
	unhook := context.AfterFunc(s.base, func() { cancel(context.Cause(s.base)) })
	ctx, cancelTimeout := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("checkpoint_timeout of %s has run out: %w", timeout, context.DeadlineExceeded))
	return ctx, func() {
		cancelTimeout()
		unhook()
		cancel(nil)
		s.rest.Reset(restAfter)
		s.wg.Done()
	}
}

// restAfter is how long after an operation the memory goes back to the system
// that it needed: there is one shim for every pod, and most do nothing.
const restAfter = 500 * time.Millisecond

// undo returns a context for taking back what an operation did: it does not
// end with the caller's.
func undo(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
}

// undoTimeout bounds each step of taking back.
const undoTimeout = 10 * time.Second

// protectShare is called when Kata has created a container, or has failed to: at
// the end of one that has not started, of its VM or of itself it may leave the
// container's files mounted, and remove them.
func (s *Service) protectShare(ctx context.Context, id string) {
	if err := s.protect(); err != nil {
		log.G(ctx).WithError(err).WithField("container", id).Error("Kata may remove the container's files, should it never start")
	}
}

// container looks up a container that Create has made, nil otherwise.
func (s *Service) container(id string) *container {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.containers[id]
}

// known is container for calls that cannot be forwarded.
func (s *Service) known(id string) (*container, error) {
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
func (s *Service) exited(id, exec string) {
	if c := s.container(id); c != nil && exec == "" {
		c.stopped()
	}
}

// locate asks Kata's shim once where the guest is.
func (s *Service) locate(ctx context.Context) (*kata.Guest, error) {
	s.mu.RLock()
	g := s.location
	s.mu.RUnlock()
	if g != nil {
		return g, nil
	}
	g, err := s.mgmt.Guest(ctx, s.sandbox)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	s.location = g
	s.mu.Unlock()
	return g, nil
}

func (s *Service) dialAgent(ctx context.Context) (net.Conn, error) {
	g, err := s.locate(ctx)
	if err != nil {
		return nil, err
	}
	conn, err := g.Dial(ctx, s.cfg.AgentPort)
	if err != nil && s.vmEnded() {
		return nil, guest.ErrNoVM
	}
	return conn, err
}

// vmEnded says whether the VM has ended, as far as anybody can tell.
func (s *Service) vmEnded() bool {
	dir := s.vmBundle.Load()
	return dir != nil && bundle.VMEnded(*dir)
}

const (
	// hookGrace is how long a guest hook may take to start the agent before the
	// throw-away container is tried.
	hookGrace = time.Second
	// lostGrace is for an agent that went away with its VM: then nothing is to
	// be started any more.
	lostGrace = time.Second
)

// meetAgent waits for the agent after a container was created.
func (s *Service) meetAgent(ctx context.Context, c *container) error {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.AgentTimeout)
	defer cancel()
	if !c.hasHooks {
		return s.agent.WaitConnect(ctx, 0, nil)
	}
	g, err := s.locate(ctx)
	if err != nil {
		return errclass.With(errdefs.ErrUnavailable, err)
	}
	grace := min(hookGrace, s.cfg.AgentTimeout/2)
	if g.HooksHideGuestHook {
		grace = 0
	}
	return s.agent.WaitConnect(ctx, grace, s.revive)
}

// inspect has the agent find out whether CRIU can work in its guest, and load
// it, which takes a second or more the first time without KVM: better before a
// container is frozen than while it is. What it found is said at the checkpoint.
func (s *Service) inspect(ctx context.Context) {
	err := s.agent.Do(ctx, func(ctx context.Context, a api.AgentService) error {
		_, err := a.Info(ctx, &api.InfoRequest{Check: true})
		return err
	})
	if err != nil {
		log.G(ctx).WithError(err).Debug("ask the agent for CRIU")
	}
}

// needAgent makes sure that the agent is there, and starts one that has died.
func (s *Service) needAgent(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.AgentTimeout)
	defer cancel()
	return s.agent.WaitConnect(ctx, 0, s.revive)
}

// revive starts the agent, unless another call has just done it.
func (s *Service) revive(ctx context.Context) error {
	select {
	case s.reviving <- struct{}{}:
		defer func() { <-s.reviving }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if s.agent.Connect(ctx) == nil {
		return nil
	}
	return s.startAgent(ctx)
}

// callAgent calls the agent with what may arrive twice. That an agent has died
// may show only by the call: then it is started again, and called again.
func (s *Service) callAgent(ctx context.Context, call func(context.Context, api.AgentService) error) error {
	if err := s.needAgent(ctx); err != nil {
		return err
	}
	err := s.agent.Do(ctx, call)
	if !guest.IsGone(err) || ctx.Err() != nil {
		return err
	}
	if err := s.needAgent(ctx); err != nil {
		return err
	}
	return s.agent.Do(ctx, call)
}

// agentLost is called when the connection to the agent broke. What is frozen
// must get its owner back before the agent thaws it.
func (s *Service) agentLost() {
	if len(s.frozen()) == 0 {
		return
	}
	s.wg.Add(1)
	go func() {
		defer s.wg.Done()
		ctx, cancel := context.WithTimeout(s.base, s.cfg.AgentTimeout)
		defer cancel()
		revive := func(ctx context.Context) error {
			if len(s.frozen()) == 0 {
				return errors.New("nothing is frozen any more")
			}
			return s.revive(ctx)
		}
		if err := s.agent.WaitConnect(ctx, min(lostGrace, s.cfg.AgentTimeout/2), revive); err != nil {
			if len(s.frozen()) > 0 && s.base.Err() == nil {
				log.L.WithError(err).Error("the agent in the guest is gone and containers are frozen")
			}
			return
		}
		for _, c := range s.frozen() {
			// The agent has to know that it is ours. Not beside an operation, which
			// may be about to thaw.
			err := c.do(ctx, func(st state) error {
				switch {
				case !st.frozen():
					return nil
				case c.thawOwed.Load():
					return st.resume(ctx)
				}
				return c.freeze(ctx)
			})
			if err != nil {
				log.L.WithError(err).WithField("container", c.id).Warn("keep frozen")
			}
		}
	}()
}

func (s *Service) frozen() []*container {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var out []*container
	for _, c := range s.containers {
		if c.isFrozen() && c.managed() {
			out = append(out, c)
		}
	}
	return out
}
