package task

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/log"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/bundle"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/kata"
)

// startAgent starts the agent where Kata has run no guest hook for the user's
// containers: by a throw-away container in the same sandbox, whose spec has no
// hooks. Its creation alone runs the guest hook. containerd never hears of it.
func (s *Service) startAgent(ctx context.Context) error {
	begin := time.Now()
	id := "kata-checkpoint-" + rand.Text()
	dir := bundle.BootstrapDir(s.cfg.StateDir, s.namespace, s.sandbox, id)
	if err := writeBootstrapBundle(dir, id, s.sandbox, filepath.Join(s.cfg.GuestBundle, api.AgentBinary)); err != nil {
		return errors.Join(err, os.RemoveAll(dir))
	}
	s.events.Hide(id)
	err := s.down.callNative(ctx, "Create", &task.CreateTaskRequest{ID: id, Bundle: dir}, &task.CreateTaskResponse{})
	s.protectShare(ctx, id)
	if err == nil || ctx.Err() != nil {
		uctx, cancel := cleanupContext(ctx)
		defer cancel()
		if derr := s.runBootstrap(uctx, id); derr != nil && !isGone(derr) {
			err = errors.Join(err, derr)
		}
	}
	err = errors.Join(err, os.RemoveAll(dir))
	switch {
	case err == nil:
	case s.agent.Connect(ctx) == nil:
		// It has done what it was for: Kata's Go shim may fail to delete it while
		// it ends.
		log.G(ctx).WithError(err).Warn("remove the container that started the agent")
	default:
		return fmt.Errorf("start the agent by a container of its own: %w", err)
	}
	log.G(ctx).WithField("duration", time.Since(begin)).Info("started the agent by a container of its own")
	return nil
}

// bootstrapTimeout bounds the life of a throw-away container.
const bootstrapTimeout = 10 * time.Second

// runBootstrap lets a throw-away container run, which does nothing, and deletes
// it. It has to have run: Kata's Rust shim unmounts what it has shared for a
// container when its process ends, not when it is deleted, and cannot remove
// the sandbox's share otherwise
// (src/runtime-rs/crates/runtimes/virt_container/src/container_manager/container_inner.rs).
func (s *Service) runBootstrap(ctx context.Context, id string) error {
	rctx, cancel := context.WithTimeout(ctx, bootstrapTimeout)
	defer cancel()
	err := s.down.callNative(rctx, "Start", &task.StartRequest{ID: id}, &task.StartResponse{})
	for err == nil {
		var st *task.StateResponse
		if st, err = s.down.state(rctx, id); err != nil || st.GetStatus() == statusStopped {
			break
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-rctx.Done():
			err = rctx.Err()
		}
	}
	if err != nil {
		log.G(ctx).WithError(err).Warn("run the container that starts the agent")
	}
	return errors.Join(s.down.callNative(ctx, "Delete", &task.DeleteRequest{ID: id}, &task.DeleteResponse{}), kata.SweepMount(s.sandbox, id, api.HelperPath))
}

// writeBootstrapBundle makes the bundle of a throw-away container: a spec with as
// little as Kata takes, over an empty root file system. Its process is our
// static binary, which says its version.
func writeBootstrapBundle(dir, id, sandbox, binary string) error {
	rootfs := filepath.Join(dir, "rootfs")
	if err := os.MkdirAll(rootfs, 0o700); err != nil {
		return fmt.Errorf("start the agent: %w", err)
	}
	spec := specs.Spec{
		Version: specs.Version,
		Root:    &specs.Root{Path: rootfs},
		// Kata's agent insists that the capabilities are named (rustjail/src/container.rs).
		Process: &specs.Process{Args: []string{api.HelperPath, "--version"}, Cwd: "/", Env: []string{"PATH=/bin"}, Capabilities: &specs.LinuxCapabilities{}},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			// For device nodes: nobody can open those on virtiofs.
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=64k"}},
			{Destination: api.HelperPath, Type: "bind", Source: binary, Options: []string{"rbind", "rprivate", "ro"}},
		},
		Annotations: annotations.InPodOf(sandbox),
		Linux: &specs.Linux{
			CgroupsPath: "/kata-checkpoint/" + id,
			Resources:   &specs.LinuxResources{},
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace}, {Type: specs.MountNamespace}, {Type: specs.NetworkNamespace},
			},
		},
	}
	data, err := json.Marshal(spec)
	if err != nil {
		return fmt.Errorf("start the agent: %w", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), data, 0o600); err != nil {
		return fmt.Errorf("start the agent: %w", err)
	}
	return nil
}
