// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/api"
)

// sandbox is the sandbox that the guest was booted for.
type sandbox struct {
	reaper *reaper
	self   string

	// mu is held while a container or a process is created, signalled or
	// removed, as the lock of Kata's agent is: an exec into a frozen cgroup
	// blocks all of that for the whole sandbox.
	mu         sync.Mutex
	id         string
	ipc, uts   string
	hookPath   string
	pidHolder  *os.File // keeps the first container's PID namespace
	containers map[string]*container

	// found guards lookups without mu, so that they never block.
	found   sync.Mutex
	process map[[2]string]*process
	groups  map[string]cgroup
}

func newSandbox(r *reaper, self string) *sandbox {
	return &sandbox{reaper: r, self: self, containers: map[string]*container{}, process: map[[2]string]*process{}, groups: map[string]cgroup{}}
}

func (s *sandbox) create(r *api.CreateSandboxRequest) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.id != "" {
		return fmt.Errorf("sandbox %s: %w", s.id, errdefs.ErrAlreadyExists)
	}
	if err := os.RemoveAll(bundleRoot); err != nil {
		return err
	}
	var err error
	if s.ipc, err = pin("ipc", unix.CLONE_NEWIPC, func() error { return nil }); err != nil {
		return err
	}
	s.uts, err = pin("uts", unix.CLONE_NEWUTS, func() error {
		if r.Hostname == "" {
			return nil
		}
		return unix.Sethostname([]byte(r.Hostname))
	})
	if err != nil {
		return err
	}
	shareFlags := uintptr(0)
	if r.ShareNodev {
		shareFlags = unix.MS_NODEV
	}
	for _, m := range []struct {
		kind, source, target string
		flags                uintptr
	}{
		{"virtiofs", api.Tag, api.GuestShare, shareFlags},
		{"tmpfs", "shm", api.GuestShm, 0},
	} {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.source, m.target, m.kind, m.flags, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	s.id, s.hookPath = r.Id, r.GuestHookPath
	return nil
}

func (s *sandbox) createContainer(r *api.CreateContainerRequest) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.id == "" {
		return fmt.Errorf("no sandbox: %w", errdefs.ErrFailedPrecondition)
	}
	if _, ok := s.containers[r.Id]; ok {
		return fmt.Errorf("container %s: %w", r.Id, errdefs.ErrAlreadyExists)
	}
	var spec specs.Spec
	if err := json.Unmarshal(r.Spec, &spec); err != nil {
		return fmt.Errorf("container %s: %w", r.Id, err)
	}
	// Kata's agent also rejects a process without capabilities.
	if spec.Root == nil || spec.Process == nil || spec.Linux == nil || spec.Process.Capabilities == nil {
		return fmt.Errorf("container %s: incomplete OCI spec: %w", r.Id, errdefs.ErrInvalidArgument)
	}
	c := &container{
		id:     r.Id,
		bundle: filepath.Join(bundleRoot, r.Id),
		cgroup: cgroup(cgroupPath(spec.Linux.CgroupsPath, r.Id)),
		spec:   &spec,
		reaper: s.reaper,
		self:   s.self,
	}
	c.state = specs.State{Version: spec.Version, ID: r.Id, Bundle: c.bundle, Annotations: spec.Annotations}
	fit := surroundings{cid: r.Id, ipc: s.ipc, uts: s.uts, self: s.self, annotate: len(spec.Annotations) > 0}
	if s.hookPath != "" && !r.SkipGuestHooks {
		c.hooks = []string{s.hookPath}
		fit.hooks = findHooks(s.hookPath, "prestart")
	}
	if r.SandboxPidns {
		if s.pidHolder == nil && len(s.containers) > 0 {
			return fmt.Errorf("container %s: the sandbox has no PID namespace: %w", r.Id, errdefs.ErrFailedPrecondition)
		}
		if s.pidHolder != nil {
			fit.pid = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), s.pidHolder.Fd())
		}
	}
	if err := c.create(fit); err != nil {
		return fmt.Errorf("create container %s: %w", r.Id, err)
	}
	if s.pidHolder == nil {
		f, err := os.Open(fmt.Sprintf("/proc/%d/ns/pid", c.init.pid))
		if err != nil {
			return errors.Join(fmt.Errorf("create container %s: %w", r.Id, err), c.destroy())
		}
		s.pidHolder = f
	}
	s.containers[r.Id] = c
	s.remember(r.Id, "", c.init)
	s.found.Lock()
	s.groups[r.Id] = c.cgroup
	s.found.Unlock()
	log.L.WithField("container", r.Id).WithField("pid", c.init.pid).Info("container created")
	return nil
}

func (s *sandbox) container(id string) (*container, error) {
	c, ok := s.containers[id]
	if !ok {
		return nil, notFound(id)
	}
	return c, nil
}

func notFound(id string) error { return fmt.Errorf("container %s: %w", id, errdefs.ErrNotFound) }

// with calls f for a container, under the lock.
func (s *sandbox) with(id string, f func(*container) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	c, err := s.container(id)
	if err != nil {
		return err
	}
	return f(c)
}

func (s *sandbox) removeContainer(id string) error {
	return s.with(id, func(c *container) error {
		if err := c.cgroup.kill(unix.SIGKILL); err != nil && !errors.Is(err, os.ErrNotExist) {
			log.L.WithError(err).Warn("failed to kill remaining processes of container")
		}
		delete(s.containers, id)
		s.forget(id)
		return c.destroy()
	})
}

func (s *sandbox) exec(r *api.ExecProcessRequest) error {
	var p specs.Process
	if err := json.Unmarshal(r.Process, &p); err != nil {
		return fmt.Errorf("exec %s: %w", r.ExecId, err)
	}
	return s.with(r.Id, func(c *container) error {
		e, err := c.exec(&p)
		if err != nil {
			return fmt.Errorf("exec %s in container %s: %w", r.ExecId, r.Id, err)
		}
		s.remember(r.Id, r.ExecId, e)
		return nil
	})
}

// signal signals one process, or, for a container and SIGKILL, its whole
// cgroup.
func (s *sandbox) signal(id, execID string, signal unix.Signal) error {
	return s.with(id, func(c *container) error {
		if execID == "" && signal == unix.SIGKILL {
			return c.cgroup.kill(signal)
		}
		p, err := s.lookUp(id, execID)
		if err != nil {
			return err
		}
		return p.signal(signal, execID == "")
	})
}

func (s *sandbox) remember(id, execID string, p *process) {
	s.found.Lock()
	defer s.found.Unlock()
	s.process[[2]string{id, execID}] = p
}

func (s *sandbox) forget(id string) {
	s.found.Lock()
	defer s.found.Unlock()
	for key, p := range s.process {
		if key[0] == id {
			p.streams.close()
			delete(s.process, key)
		}
	}
	delete(s.groups, id)
}

// lookUp finds a process. A process that has exited stays until its container
// is removed, because its status is requested last.
func (s *sandbox) lookUp(id, execID string) (*process, error) {
	s.found.Lock()
	defer s.found.Unlock()
	p, ok := s.process[[2]string{id, execID}]
	if !ok {
		return nil, fmt.Errorf("process %q of container %s: %w", execID, id, errdefs.ErrNotFound)
	}
	return p, nil
}
