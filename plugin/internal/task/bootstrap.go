// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/log"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/bundle"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/kata"
)

// startAgent starts the agent where Kata runs no guest hook for the user's
// containers, or where it has died: by a bootstrap container in the same
// sandbox, whose spec has no hooks. Its creation runs the guest hook.
// containerd does not see it.
func (s *Service) startAgent(ctx context.Context) error {
	begin := time.Now()
	id := "kata-checkpoint-" + rand.Text()
	dir := bundle.BootstrapDir(s.cfg.StateDir, s.namespace, s.sandbox, id)
	if err := writeBootstrapBundle(dir, id, s.sandbox, s.cfg.Agent()); err != nil {
		return errclass.Join(err, os.RemoveAll(dir))
	}
	s.events.Hide(id)
	err := s.down.callNative(ctx, "Create", &task.CreateTaskRequest{ID: id, Bundle: dir}, &task.CreateTaskResponse{})
	s.protectShare(ctx, id)
	if err == nil || ctx.Err() != nil {
		uctx, cancel := cleanupContext(ctx)
		defer cancel()
		if derr := s.runBootstrap(uctx, id); derr != nil && !isGone(derr) {
			err = errclass.Join(err, derr)
		}
	}
	err = errclass.Join(err, os.RemoveAll(dir))
	switch {
	case err == nil:
	case s.agent.Connect(ctx) == nil:
		// The agent is there. Kata's Go shim may fail to delete a container that is
		// exiting.
		log.G(ctx).WithError(err).WithField("container", id).Warn("failed to delete bootstrap container")
	default:
		return fmt.Errorf("start the agent with a bootstrap container: %w", err)
	}
	log.G(ctx).WithField("duration", time.Since(begin)).Info("started the agent with a bootstrap container")
	return nil
}

// bootstrapTimeout bounds the run time of a bootstrap container.
const bootstrapTimeout = 10 * time.Second

// runBootstrap runs a bootstrap container, whose process does nothing, and
// deletes it. It must run: Kata's Rust shim unmounts a container's part of the
// share when its process exits, not when it is deleted, and cannot remove the
// sandbox's share otherwise
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
		log.G(ctx).WithError(err).WithField("container", id).Warn("failed to run bootstrap container")
	}
	return errclass.Join(s.down.callNative(ctx, "Delete", &task.DeleteRequest{ID: id}, &task.DeleteResponse{}), kata.SweepMount(s.sandbox, id, api.HelperPath))
}

// writeBootstrapBundle writes the bundle of a bootstrap container: the smallest
// spec that Kata accepts, with an empty root file system. Its process is the
// agent's static binary, which prints its version.
func writeBootstrapBundle(dir, id, sandbox, binary string) error {
	rootfs := filepath.Join(dir, "rootfs")
	if err := os.MkdirAll(rootfs, 0o700); err != nil {
		return fmt.Errorf("write the bundle of the bootstrap container: %w", err)
	}
	spec := specs.Spec{
		Version: specs.Version,
		Root:    &specs.Root{Path: rootfs},
		// kata-agent requires capabilities (rustjail/src/container.rs).
		Process: &specs.Process{Args: []string{api.HelperPath, "--version"}, Cwd: "/", Env: []string{"PATH=/bin"}, Capabilities: &specs.LinuxCapabilities{}},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			// For device nodes, which cannot be opened on virtiofs.
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
		return fmt.Errorf("write the bundle of the bootstrap container: %w", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), data, 0o600); err != nil {
		return fmt.Errorf("write the bundle of the bootstrap container: %w", err)
	}
	return nil
}
