// SPDX-License-Identifier: Apache-2.0

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
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/bundle"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/guest"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/kata"
)

const (
	// hookGrace is how long a guest hook may take to start the agent before a
	// bootstrap container is tried.
	hookGrace = time.Second
	// lostGrace is the time between losing the agent and restarting it: if it
	// went away with its VM, there is nothing to restart.
	lostGrace = time.Second
)

// locate returns the guest's address, for which it asks Kata's shim once.
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

// vmEnded reports whether the VM is known to have ended.
func (s *Service) vmEnded() bool {
	dir := s.vmBundle.Load()
	return dir != nil && bundle.VMEnded(*dir)
}

// awaitAgent waits until the agent is reachable after a container was created.
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

// checkCRIU has the agent load CRIU and check whether it works in the guest.
// The first time takes a second or more without KVM, which is better spent
// before a container is frozen than while it is, and best before it is paused.
// Checkpoint reports what was
// found. It returns whether there can be pre-dumps.
func (s *Service) checkCRIU(ctx context.Context) (canPreDump bool) {
	var info *api.InfoResponse
	err := s.agent.CallIdempotent(ctx, func(ctx context.Context, a api.AgentService) (err error) {
		info, err = a.Info(ctx, &api.InfoRequest{Check: true})
		return err
	})
	if err != nil {
		log.G(ctx).WithError(err).Debug("failed to have the agent check CRIU")
	}
	return info.GetPreDump()
}

// ensureAgent connects to the agent, and restarts it if it has died.
func (s *Service) ensureAgent(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.AgentTimeout)
	defer cancel()
	return s.agent.WaitConnect(ctx, 0, s.restartAgent)
}

// restartAgent starts the agent, unless a concurrent call has just done so.
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

// callAgent makes an idempotent call to the agent. If the call shows that the
// agent has died, the agent is restarted and the call repeated.
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

// onAgentLost is called when the connection to the agent has broken. The agent
// thaws containers without an owner, so that those that are to remain frozen
// need one in time.
func (s *Service) onAgentLost() {
	if len(s.frozen()) == 0 {
		return
	}
	s.background(func(ctx context.Context) {
		ctx, cancel := context.WithTimeout(ctx, s.cfg.AgentTimeout)
		defer cancel()
		restart := func(ctx context.Context) error {
			if len(s.frozen()) == 0 {
				return errors.New("no container is frozen any longer")
			}
			return s.restartAgent(ctx)
		}
		if err := s.agent.WaitConnect(ctx, min(lostGrace, s.cfg.AgentTimeout/2), restart); err != nil {
			if len(s.frozen()) > 0 && s.base.Err() == nil {
				log.L.WithError(err).Error("failed to reconnect to the agent in the guest: containers are frozen without an owner")
			}
			return
		}
		for _, c := range s.frozen() {
			// Freezing it again makes this shim its owner. Not concurrently with an
			// operation, which may be about to thaw it.
			err := c.do(ctx, func(st state) error {
				paused, ok := st.(pausedState)
				switch {
				case !ok, paused.runs:
					return nil
				case paused.thawOwed:
					return paused.resume(ctx)
				}
				return c.freeze(ctx)
			})
			if err != nil {
				log.L.WithError(err).WithField("container", c.id).Warn("failed to keep container frozen")
			}
		}
	})
}

// frozen returns the containers that the agent holds frozen for this shim.
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

// explain adds to the reason why the agent cannot be used what to do about it.
func (c *container) explain(reason error) error {
	var other *guest.ProtocolError
	if errors.As(reason, &other) || errors.Is(reason, guest.ErrNoVM) || c.agentErr == nil {
		return reason
	}
	dir := filepath.Base(c.s.cfg.GuestBundle)
	err := errcode.NoAgent.Errorf("kata-checkpoint has no agent in this VM: %w; in Kata's configuration set sandbox_bind_mounts = [%q] and guest_hook_path = "+
		`"/run/kata-containers/shared/containers/sandbox-mounts/%s/hooks" (Kata's Rust shim: "/run/kata-containers/shared/containers/passthrough/sandbox-mounts/%s/hooks")`,
		reason, c.s.cfg.GuestBundle, dir, dir)
	if c.s.cfg.AgentOptional {
		return err
	}
	return fmt.Errorf(`%w, or set guest_agent = "optional" in kata-checkpoint's config.toml to run containers that cannot be checkpointed`, err)
}
