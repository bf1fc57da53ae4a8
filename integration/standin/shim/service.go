// SPDX-License-Identifier: Apache-2.0

// Package shim is the stand-in for Kata's shim: the binary that containerd
// starts and its task service. It keeps the contract of either of Kata's shims,
// quirks included, as far as a wrapping shim or an engine can observe it. Kata
// 4.1.0: src/runtime/pkg/containerd-shim-v2 and src/runtime-rs/crates.
package shim

import (
	"context"
	"fmt"
	"sync"

	eventstypes "github.com/containerd/containerd/api/events"
	task "github.com/containerd/containerd/api/runtime/task/v2"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/config"
	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/hostspec"
	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/publish"
	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/sandbox"
	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/stdio"
	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/way"
)

// service is the task service of one sandbox.
type service struct {
	way       way.Way
	id        string // the sandbox's
	namespace string
	events    *publish.Publisher
	// exit stops the shim, with or without an answer to the request in
	// progress.
	exit func()

	// mu guards what follows. The Go way holds it for nearly the whole of every
	// request, including calls to the guest.
	mu         sync.Mutex
	sandbox    *sandbox.Sandbox
	containers map[string]*container

	// teardown counts the containers that are being cleaned up after their
	// exit.
	teardown sync.WaitGroup
}

func newService(w way.Way, id, namespace string, events *publish.Publisher, exit func()) *service {
	return &service{way: w, id: id, namespace: namespace, events: events, exit: exit, containers: map[string]*container{}}
}

// enter finds a container and takes the lock that its way uses for a request.
func (s *service) enter(id string) (c *container, leave func(), err error) {
	s.mu.Lock()
	c, ok := s.containers[id]
	if !ok {
		s.mu.Unlock()
		return nil, nil, fmt.Errorf("container %s: %w", id, errdefs.ErrNotFound)
	}
	if s.way == way.Go {
		return c, s.mu.Unlock, nil
	}
	s.mu.Unlock()
	c.mu.Lock()
	return c, c.mu.Unlock, nil
}

// enterProcess is enter for a process.
func (s *service) enterProcess(id, execID string) (*container, *process, func(), error) {
	c, leave, err := s.enter(id)
	if err != nil {
		return nil, nil, nil, err
	}
	p := c.init
	if execID != "" {
		if p = c.execs[execID]; p == nil {
			leave()
			return nil, nil, nil, fmt.Errorf("exec %s of container %s: %w", execID, id, errdefs.ErrNotFound)
		}
	}
	return c, p, leave, nil
}

// pid is the only pid that the engine sees, for all of a guest's processes.
func (s *service) pid() uint32 {
	if s.sandbox == nil {
		return 0
	}
	return s.sandbox.Pid()
}

func (s *service) lockedPid() uint32 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pid()
}

// Create creates a container, and first its sandbox if the container owns one.
// A checkpoint in the request is ignored, as by Kata.
func (s *service) Create(ctx context.Context, r *task.CreateTaskRequest) (*task.CreateTaskResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.containers[r.ID]; ok {
		return nil, fmt.Errorf("container %s: %w", r.ID, errdefs.ErrAlreadyExists)
	}
	spec, err := hostspec.Load(r.Bundle)
	if err != nil {
		return nil, err
	}
	kind, sandboxID, err := hostspec.Classify(r.ID, spec.Annotations)
	if err != nil {
		return nil, err
	}
	c := &container{id: r.ID, kind: kind, bundle: r.Bundle, spec: spec, execs: map[string]*process{}}
	c.init = newProcess(r.ID, "", stdio.Paths{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal})
	if err := s.create(ctx, c, sandboxID, r); err != nil {
		return nil, fmt.Errorf("create container %s: %w", r.ID, err)
	}
	s.containers[r.ID] = c
	created := &eventstypes.TaskCreate{ContainerID: r.ID, Bundle: r.Bundle, Pid: s.pid()}
	if s.way == way.Go {
		created.Rootfs, created.Checkpoint = r.Rootfs, r.Checkpoint
		created.IO = &eventstypes.TaskIO{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal}
	} else {
		// The Rust shim starts a wait here and another one at the start.
		s.announceExit(c, c.init)
	}
	s.events.Send(created)
	return &task.CreateTaskResponse{Pid: s.pid()}, nil
}

func (s *service) create(ctx context.Context, c *container, sandboxID string, r *task.CreateTaskRequest) (err error) {
	if c.kind.OwnsSandbox() == (s.sandbox != nil) {
		if s.sandbox != nil {
			return fmt.Errorf("the shim has sandbox %s already: %w", s.sandbox.ID, errdefs.ErrFailedPrecondition)
		}
		return fmt.Errorf("sandbox %s does not exist: %w", sandboxID, errdefs.ErrFailedPrecondition)
	}
	var fresh *sandbox.Sandbox
	defer func() {
		if err == nil {
			return
		}
		if fresh != nil {
			fresh.Stop(ctx)
			if rerr := fresh.Remove(); rerr != nil {
				log.L.WithError(rerr).Error("failed to clean up after a failed create")
			}
			s.sandbox = nil
		}
		s.unmountRootfs(c)
	}()
	if err := s.mountRootfs(c, r); err != nil {
		return err
	}
	if c.kind.OwnsSandbox() {
		if fresh, err = s.createSandbox(ctx, c, r.Options); err != nil {
			return err
		}
		s.sandbox = fresh
	} else if s.way == way.Go {
		err = s.sandbox.NetworkNamespace().Do(func() error { return s.runtimeHooks(ctx, c, 0) })
	} else {
		err = s.containerHooks(ctx, c, s.sandbox)
	}
	if err != nil {
		return err
	}
	if err := s.sandbox.CreateContainer(ctx, c.id, c.kind, c.bundle, c.spec); err != nil {
		return err
	}
	if fresh != nil {
		return fresh.Serve()
	}
	return nil
}

func (s *service) createSandbox(ctx context.Context, c *container, options *anypb.Any) (*sandbox.Sandbox, error) {
	path, err := configPath(options)
	if err != nil {
		return nil, err
	}
	cfg, err := config.Load(path)
	if err != nil {
		return nil, err
	}
	if cfg.Way != s.way {
		return nil, fmt.Errorf("the configuration is for Kata's %s shim, and this one stands in for the %s shim: %w", cfg.Way, s.way, errdefs.ErrInvalidArgument)
	}
	if err := cfg.Override(c.spec.Annotations); err != nil {
		return nil, err
	}
	return sandbox.Create(ctx, sandbox.Options{
		ID: s.id, Config: cfg, Spec: c.spec,
		BeforeContainers: func(fresh *sandbox.Sandbox) error {
			// In the host's network namespace: a hook creates a bridge there.
			annotateNetwork(c.spec, fresh.NetworkNamespace().Path)
			if err := s.runtimeHooks(ctx, c, int(fresh.Pid())); err != nil {
				return err
			}
			return s.containerHooks(ctx, c, fresh)
		},
	})
}

// configPath reads the engine's options. Those of another runtime, which the
// CRI may send, are ignored.
func configPath(options *anypb.Any) (string, error) {
	var o runtimeoptions.Options
	if options == nil || options.TypeUrl != string(o.ProtoReflect().Descriptor().FullName()) {
		return "", nil
	}
	if err := proto.Unmarshal(options.Value, &o); err != nil {
		return "", fmt.Errorf("read the runtime's options: %w", err)
	}
	return o.ConfigPath, nil
}

// mountRootfs mounts a container's root in the bundle, only in the shim's mount
// namespace.
func (s *service) mountRootfs(c *container, r *task.CreateTaskRequest) error {
	if len(r.Rootfs) == 0 {
		return nil
	}
	mounts := make([]mount.Mount, len(r.Rootfs))
	for i, m := range r.Rootfs {
		mounts[i] = mount.Mount{Type: m.Type, Source: m.Source, Target: m.Target, Options: m.Options}
	}
	c.mounted = true
	if err := mount.All(mounts, rootfs(c.bundle)); err != nil {
		return fmt.Errorf("mount the root: %w", err)
	}
	return nil
}

func (s *service) unmountRootfs(c *container) {
	if !c.mounted {
		return
	}
	c.mounted = false
	if err := mount.UnmountAll(rootfs(c.bundle), 0); err != nil {
		log.L.WithError(err).WithField("container", c.id).Warn("failed to unmount root")
	}
}
