// SPDX-License-Identifier: Apache-2.0

// Package sandbox manages one VM with its containers from the host: its share,
// its processes and its agent. Package shim is the caller.
package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/api"
	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/config"
	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/hostspec"
	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/netns"
	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/network"
	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/share"
	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/vm"
	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/way"
)

// Sandbox is one VM with its containers.
type Sandbox struct {
	ID     string
	config *config.Config
	// shareLock guards the share: containers are added and removed
	// concurrently.
	shareLock sync.Mutex
	share     *share.Share
	netns     *netns.Namespace
	network   *network.Network // nil if the configuration disables it
	vm        *vm.VM
	client    *ttrpc.Client
	// Agent is the client of the guest's agent. Streams and waits may use it
	// without a lock.
	Agent   api.AgentService
	monitor *monitor

	stopOnce, removeOnce sync.Once
	removed              error
}

// Options describes a sandbox.
type Options struct {
	ID     string
	Config *config.Config
	// Spec is the first container's OCI spec, as the engine wrote it.
	Spec *specs.Spec
	// BeforeContainers is called once the VMM has a pid, with the path of its
	// network namespace, to run the engine's hooks.
	BeforeContainers func(s *Sandbox) error
}

// Create boots a sandbox and returns when its agent has accepted it.
func Create(ctx context.Context, o Options) (_ *Sandbox, err error) {
	start := time.Now()
	s := &Sandbox{ID: o.ID, config: o.Config}
	if err := claim(way.ShareDir(o.ID), o.Config.Way.VMDir(o.ID)); err != nil {
		return nil, fmt.Errorf("create sandbox %s: %w", o.ID, err)
	}
	defer func() {
		if err != nil {
			s.Stop(ctx)
			err = errors.Join(fmt.Errorf("create sandbox %s: %w", o.ID, err), s.Remove())
		}
	}()
	if s.share, err = share.New(o.Config.Way, o.ID); err != nil {
		return nil, err
	}
	if err := s.share.BindSandbox(o.Config.BindMounts); err != nil {
		return nil, err
	}
	if s.netns, err = netns.New(hostspec.NetworkNamespace(o.Spec), o.ID); err != nil {
		return nil, err
	}
	if !o.Config.NoNetwork {
		s.network = network.New(s.netns)
	}
	if err := s.boot(ctx); err != nil {
		return nil, err
	}
	if err := s.record(); err != nil {
		return nil, err
	}
	if err := o.BeforeContainers(s); err != nil {
		return nil, err
	}
	if err := s.plug(ctx); err != nil {
		return nil, err
	}
	if err := s.connect(ctx); err != nil {
		return nil, err
	}
	if err := s.updateNetwork(ctx); err != nil {
		return nil, err
	}
	_, err = s.Agent.CreateSandbox(ctx, &api.CreateSandboxRequest{
		Id: o.ID, Hostname: o.Spec.Hostname, GuestHookPath: o.Config.HookPath, ShareNodev: o.Config.Way == way.Rust,
	})
	if err != nil {
		return nil, err
	}
	log.L.WithField("sandbox", o.ID).WithField("took", time.Since(start)).Info("sandbox is up")
	return s, nil
}

// claim creates a sandbox's directories, none of which may exist: otherwise a
// sandbox with the same id elsewhere on the machine would lose its own.
func claim(dirs ...string) error {
	for i, dir := range dirs {
		err := os.MkdirAll(filepath.Dir(dir), 0o750)
		if err == nil {
			err = os.Mkdir(dir, 0o750)
		}
		if err != nil {
			for _, made := range dirs[:i] {
				err = errors.Join(err, os.Remove(made))
			}
			return err
		}
	}
	return nil
}

func (s *Sandbox) connect(ctx context.Context) error {
	c, err := s.vm.DialAgent(ctx)
	if err != nil {
		return err
	}
	s.client = ttrpc.NewClient(c)
	s.Agent = api.NewAgentClient(s.client)
	go func() {
		// Requests in progress must not outlive the VM.
		<-s.vm.Gone()
		s.client.Close()
	}()
	if s.config.Way == way.Go {
		go s.watch()
	}
	return nil
}

// Serve opens the sandbox's management socket. Call it once the first container
// exists: others find the sandbox by this socket.
func (s *Sandbox) Serve() (err error) {
	w := s.config.Way
	s.monitor, err = serveMonitor(w.MonitorSocket(s.ID), fmt.Sprintf("hvsock://%s:%d", w.VsockSocket(s.ID), api.Port))
	return err
}

// Pid returns the VMM's pid.
func (s *Sandbox) Pid() uint32 { return uint32(s.vm.Pid()) }

// NetworkNamespace returns the VMM's network namespace.
func (s *Sandbox) NetworkNamespace() *netns.Namespace { return s.netns }

// CreateContainer shares a bundle's root and volumes and has the agent create
// the container.
func (s *Sandbox) CreateContainer(ctx context.Context, id string, kind hostspec.Kind, bundle string, spec *specs.Spec) (err error) {
	guest, err := hostspec.ForGuest(s.config.Way, kind, bundle, spec)
	if err != nil {
		return err
	}
	if !s.config.GuestSeccomp {
		guest.Linux.Seccomp = nil
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.release(id))
		}
	}()
	if err := s.shareContainer(id, bundle, spec, guest); err != nil {
		return err
	}
	raw, err := json.Marshal(guest)
	if err != nil {
		return err
	}
	_, err = s.Agent.CreateContainer(ctx, &api.CreateContainerRequest{
		Id:           id,
		Spec:         raw,
		SandboxPidns: hostspec.SharesPidNamespace(spec),
		// The Rust shim's empty hooks object replaces the agent's own hooks.
		SkipGuestHooks: s.config.Way == way.Rust && hostspec.HasHooks(spec),
	})
	return err
}

// shareContainer shares the paths in spec, and sets the paths in guest as the
// guest sees them.
func (s *Sandbox) shareContainer(id, bundle string, spec, guest *specs.Spec) (err error) {
	s.shareLock.Lock()
	defer s.shareLock.Unlock()
	root := spec.Root.Path
	if !filepath.IsAbs(root) {
		root = filepath.Join(bundle, root)
	}
	if guest.Root.Path, err = s.share.Rootfs(id, root); err != nil {
		return err
	}
	guest.Mounts, err = s.share.Volumes(id, guest.Mounts)
	return err
}

func (s *Sandbox) release(id string) error {
	s.shareLock.Lock()
	defer s.shareLock.Unlock()
	return s.share.Release(id)
}

// RemoveContainer kills what is left of a container and removes its part of the
// share. A guest that no longer answers has nothing left.
func (s *Sandbox) RemoveContainer(ctx context.Context, id string) error {
	_, err := s.Agent.RemoveContainer(ctx, &api.ContainerRequest{Id: id})
	if err != nil {
		log.L.WithError(err).WithField("container", id).Warn("failed to remove container in the guest")
	}
	return s.release(id)
}

// Stop stops the VM and returns when it has exited. It may be called more than
// once.
func (s *Sandbox) Stop(ctx context.Context) {
	s.stopOnce.Do(func() {
		if s.monitor != nil {
			s.monitor.close()
		}
		if s.vm != nil {
			s.vm.Stop(ctx)
		}
		if s.client != nil {
			s.client.Close()
		}
	})
}

// Remove removes the sandbox's files on the host, after Stop.
func (s *Sandbox) Remove() error {
	s.removeOnce.Do(func() {
		var failures []error
		if s.share != nil {
			failures = append(failures, s.share.Remove())
		}
		if s.network != nil {
			failures = append(failures, s.network.Remove())
		}
		if s.netns != nil {
			failures = append(failures, s.netns.Remove())
		}
		w := s.config.Way
		failures = append(failures, os.RemoveAll(w.VMDir(s.ID)), os.RemoveAll(w.StateDir(s.ID)))
		if err := errors.Join(failures...); err != nil {
			s.removed = fmt.Errorf("remove sandbox %s: %w", s.ID, err)
		}
	})
	return s.removed
}
