// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/hook"
	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/sandbox"
	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/way"
)

func rootfs(bundle string) string { return filepath.Join(bundle, "rootfs") }

// annotateNetwork tells nerdctl's hooks which network namespace to set up.
func annotateNetwork(spec *specs.Spec, path string) {
	if spec.Annotations == nil {
		spec.Annotations = map[string]string{}
	}
	spec.Annotations["nerdctl/network-namespace"] = path
}

// runtimeHooks runs the engine's prestart and createRuntime hooks on the host.
// pid 0 stands for the shim's own.
func (s *service) runtimeHooks(ctx context.Context, c *container, pid int) error {
	h := c.spec.Hooks
	if h == nil {
		return nil
	}
	//nolint:staticcheck // deprecated, and in use
	if err := s.runHooks(ctx, c, h.Prestart, pid, specs.StateCreating); err != nil {
		return err
	}
	return s.runHooks(ctx, c, h.CreateRuntime, pid, specs.StateCreating)
}

// containerHooks runs the hooks right before a container's creation. The Go way
// does not run them.
func (s *service) containerHooks(ctx context.Context, c *container, sandbox *sandbox.Sandbox) error {
	if c.spec.Hooks == nil || s.way != way.Rust {
		return nil
	}
	return sandbox.NetworkNamespace().Do(func() error {
		return s.runHooks(ctx, c, c.spec.Hooks.CreateContainer, int(sandbox.Pid()), specs.StateCreating)
	})
}

// runHooks runs hooks. The Go way passes no status, has no timeout, and stops
// at the first failure; the Rust way ignores failures.
func (s *service) runHooks(ctx context.Context, c *container, hooks []specs.Hook, pid int, status specs.ContainerState) error {
	if pid == 0 {
		pid = os.Getpid()
	}
	state := specs.State{Version: c.spec.Version, ID: c.id, Status: status, Pid: pid, Bundle: c.bundle, Annotations: c.spec.Annotations}
	limit := hook.Limit
	if s.way == way.Go {
		state.Version, state.Status, limit = "", "", time.Duration(0)
		if c.kind.OwnsSandbox() {
			state.ID = s.id
		}
	}
	for _, h := range hooks {
		err := hook.Run(ctx, h, state, limit)
		if err == nil {
			continue
		}
		if s.way == way.Go {
			return fmt.Errorf("run the engine's hooks: %w", err)
		}
		log.L.WithError(err).WithField("container", c.id).Error("engine hook failed")
	}
	return nil
}

// afterStart runs the engine's poststart hooks; their failure is only logged.
func (s *service) afterStart(ctx context.Context, c *container) {
	if c.spec.Hooks == nil {
		return
	}
	pid := 0
	if s.way == way.Rust {
		pid = int(s.sandbox.Pid())
	}
	run := func() error { return s.runHooks(ctx, c, c.spec.Hooks.Poststart, pid, specs.StateRunning) }
	if s.way == way.Go {
		inside := run
		run = func() error { return s.sandbox.NetworkNamespace().Do(inside) }
	}
	if err := run(); err != nil {
		log.L.WithError(err).WithField("container", c.id).Warn("poststart hooks failed")
	}
}

// afterStop runs the engine's poststop hooks.
func (s *service) afterStop(ctx context.Context, c *container) {
	if c.spec.Hooks == nil {
		return
	}
	pid := 0
	if s.way == way.Rust {
		pid = int(s.sandbox.Pid())
	}
	if err := s.runHooks(ctx, c, c.spec.Hooks.Poststop, pid, specs.StateStopped); err != nil {
		log.L.WithError(err).WithField("container", c.id).Warn("poststop hooks failed")
	}
}
