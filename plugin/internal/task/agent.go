package task

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/bundle"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/guest"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/kata"
)

const (
	// hookGrace is how long a guest hook may take to start the agent before the
	// throw-away container is tried.
	hookGrace = time.Second
	// lostGrace is for an agent that went away with its VM: then nothing is to
	// be started any more.
	lostGrace = time.Second
)

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

// awaitAgent waits for the agent after a container was created.
func (s *Service) awaitAgent(ctx context.Context, c *container) error {
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
	return s.agent.WaitConnect(ctx, grace, s.restartAgent)
}

// inspect has the agent find out whether CRIU can work in its guest, and load
// it, which takes a second or more the first time without KVM: better before a
// container is frozen than while it is. What it found is said at the checkpoint.
func (s *Service) checkCRIU(ctx context.Context) {
	err := s.agent.CallIdempotent(ctx, func(ctx context.Context, a api.AgentService) error {
		_, err := a.Info(ctx, &api.InfoRequest{Check: true})
		return err
	})
	if err != nil {
		log.G(ctx).WithError(err).Debug("ask the agent for CRIU")
	}
}

// ensureAgent makes sure that the agent is there, and starts one that has died.
func (s *Service) ensureAgent(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.AgentTimeout)
	defer cancel()
	return s.agent.WaitConnect(ctx, 0, s.restartAgent)
}

// revive starts the agent, unless another call has just done it.
func (s *Service) restartAgent(ctx context.Context) error {
	select {
	case s.restarting <- struct{}{}:
		defer func() { <-s.restarting }()
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
	if err := s.ensureAgent(ctx); err != nil {
		return err
	}
	err := s.agent.CallIdempotent(ctx, call)
	if !guest.IsGone(err) || ctx.Err() != nil {
		return err
	}
	if err := s.ensureAgent(ctx); err != nil {
		return err
	}
	return s.agent.CallIdempotent(ctx, call)
}

// agentLost is called when the connection to the agent broke. What is frozen
// must get its owner back before the agent thaws it.
func (s *Service) onAgentLost() {
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
			return s.restartAgent(ctx)
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
				paused, ok := st.(pausedState)
				switch {
				case !ok:
					return nil
				case paused.thawOwed:
					return paused.resume(ctx)
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

// explain says what to do about an agent that cannot be used.
func (c *container) explain(reason error) error {
	var other *guest.ProtocolError
	if errors.As(reason, &other) || errors.Is(reason, guest.ErrNoVM) || c.agentErr == nil {
		return reason
	}
	dir := filepath.Base(c.s.cfg.GuestBundle)
	err := fmt.Errorf("kata-checkpoint has no agent in this VM: %w; in Kata's configuration set sandbox_bind_mounts = [%q] and guest_hook_path = "+
		`"/run/kata-containers/shared/containers/sandbox-mounts/%s/hooks" (Kata's Rust shim: "/run/kata-containers/shared/containers/passthrough/sandbox-mounts/%s/hooks")`,
		reason, c.s.cfg.GuestBundle, dir, dir)
	if c.s.cfg.AgentOptional {
		return err
	}
	return fmt.Errorf(`%w, or set guest_agent = "optional" in kata-checkpoint's config.toml to run containers that cannot be checkpointed`, err)
}
