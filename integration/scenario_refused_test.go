// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/containerd/containerd/api/services/tasks/v1"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"

	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/typeurl/v2"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// refused: a checkpoint that cannot be made is refused by a sentence that says
// what to do, and costs the container nothing.
func refused(s *scenario) {
	pod := s.startPod()
	c := pod.create(counter("c"))
	run := s.run(c)
	s.waitNumbers(run.Output, workload.Ticks, 3)

	// The guest, as if its kernel had been built otherwise. The agent asks a
	// kernel once.
	s.shellInGuest(pod, "mount -t tmpfs none /proc/sys/kernel")
	s.checkRefused("a kernel without CHECKPOINT_RESTORE", run, s.newDir(), "CONFIG_CHECKPOINT_RESTORE", "configs/kernel")
	s.shellInGuest(pod, "umount /proc/sys/kernel")
	s.checkKeepsRunning(run)
	// An agent that has died is started again, and asks again.
	s.killAgent(pod)
	s.check(s.engine.CheckpointTo(s.ctx, run, s.newDir(), false))
	s.checkKeepsRunning(run)
	s.step("the guest")

	// The directory for the image set.
	s.checkRefused("a directory that does not exist", run, filepath.Join(s.newDir(), "none"), "does not exist", "create it")
	for name, mount := range map[string]struct {
		flags   uintptr
		options string
		words   []string
	}{
		"a directory that cannot be written to": {syscall.MS_RDONLY, "", []string{"cannot be written to", "read-only file system"}},
		"a full file system":                    {0, "size=1m", []string{"no space left for the image set", "free some", "reserve_bytes"}},
	} {
		dir := s.newDir()
		s.check(syscall.Mount("tmpfs", dir, "tmpfs", mount.flags, mount.options))
		s.checkRefused(name, run, dir, mount.words...)
		left, err := os.ReadDir(dir)
		s.check(err)
		if len(left) > 0 {
			s.Errorf("%s: the refused checkpoint left %v", name, left)
		}
		s.check(syscall.Unmount(dir, 0))
		s.checkKeepsRunning(run)
	}
	s.step("the directory")

	// The workload.
	c = pod.create(engine.Container{ID: "io-uring", Args: []string{workload.Path, "io-uring"}})
	uring := s.run(c)
	s.waitNumbers(uring.Output, workload.Rounds, 2)
	s.checkRefused("io_uring", uring, s.newDir(), "io_uring", "workload")
	s.checkKeepsRunning(uring)
	if err := s.engine.CheckpointTo(s.ctx, uring, s.newDir(), false); err == nil || !strings.Contains(err.Error(), "io_uring") { // which pauses it first
		s.Errorf("io_uring, by a client of containerd's: %v", err)
	}
	s.checkKeepsRunning(uring)
	s.remove(c)
	listener := pod.create(engine.Container{ID: "listener", Args: []string{workload.Path, "peer", "--listen"}})
	outside := s.run(listener)
	s.waitLine(outside.Output, 0, "listening")
	c = pod.create(engine.Container{ID: "peer", Args: []string{workload.Path, "peer"}})
	peer := s.run(c)
	s.waitNumbers(peer.Output, workload.Rounds, 2)
	s.checkRefused("a unix socket connected to outside", peer, s.newDir(), "unix socket", "outside of the container", "close the connection")
	s.checkKeepsRunning(peer)
	s.remove(c)
	s.waitExit(outside, 1) // its peer is gone; a kill would race with that
	s.remove(listener)
	c = pod.create(pod.withPodPIDs(engine.Container{ID: "strayed", Args: []string{"sh", "-c", "(sleep 1000 &); exec " + workload.Path + " counter --shm /dev/shm/strayed"}}))
	strayed := s.run(c)
	s.waitNumbers(strayed.Output, workload.Ticks, 2)
	s.checkRefused("a process that has strayed to its pod", strayed, s.newDir(), "sleep (pid", "lost its parent", "subreaper", "pid namespace of its own")
	s.checkKeepsRunning(strayed)
	s.remove(c)
	s.step("the workload")

	// The time.
	c = pod.create(counter("not-yet"))
	task, err := c.NewTask(s.ctx, cio.NullIO)
	s.check(err)
	s.checkRefused("a task that was not started", &engine.Run{Task: task}, s.newDir(), "has not been started")
	_, err = task.Delete(s.ctx, client.WithProcessKill)
	s.check(err)
	second := make(chan error, 1)
	first := make(chan error, 1)
	dir := s.newDir()
	go func() { first <- s.requestCheckpoint(run, dir) }()
	if !s.eventually(settleTimeout, func() bool {
		status, err := run.Status(s.ctx)
		return err == nil && status.Status == client.Paused
	}) {
		s.Fatal("a checkpoint does not begin")
	}
	go func() { second <- s.requestCheckpoint(run, s.newDir()) }()
	err = <-second
	if err == nil || !strings.Contains(err.Error(), "in progress") {
		s.Errorf("a second checkpoint meanwhile: %v", err)
	}
	s.Logf("a second checkpoint meanwhile: %v", err)
	s.check(<-first)
	s.checkKeepsRunning(run)
	s.check(run.Kill(s.ctx, syscall.SIGKILL))
	_, err = run.Exit(s.ctx)
	s.check(err)
	s.checkRefused("a task that has stopped", run, s.newDir(), "has stopped")
	_, err = run.Delete(s.ctx)
	s.check(err)
	s.step("the time")
}

// refusedWithoutAgent: where no agent is in the guest, containers run if the
// operator wants that, and cannot be checkpointed.
func refusedWithoutAgent(s *scenario) {
	s.configure("agent_port", 10749)
	s.configure("agent_timeout", "1s")
	c := s.create(counter("strict"))
	if _, err := s.engine.Start(s.ctx, c); err == nil || !strings.Contains(err.Error(), "agent") || !strings.Contains(err.Error(), "guest_agent") {
		s.Errorf("a start without an agent: %v", err)
	} else {
		s.Logf("refused: %v", err)
	}
	s.remove(c)
	s.configure("guest_agent", "optional")
	run := s.run(s.create(counter("c")))
	s.waitNumbers(run.Output, workload.Ticks, 3)
	s.checkRefused("no agent", run, s.newDir(), "agent")
	s.checkKeepsRunning(run)
}

// refusedNoRoom: the file system on which the guest leaves its images is full
// before the last of them is written.
func refusedNoRoom(s *scenario) {
	state, err := os.MkdirTemp("/var/tmp", "kata-checkpoint-state-")
	s.check(err)
	s.check(syscall.Mount("tmpfs", state, "tmpfs", 0, "size=1m"))
	s.afterContainers(func() error { return errors.Join(syscall.Unmount(state, 0), os.Remove(state)) })
	s.configure("state_dir", state)
	c := s.create(counter("c"))
	run := s.run(c)
	s.waitNumbers(run.Output, workload.Ticks, 3)
	for range 2 { // the first one leaves nothing that the second one would find in its way
		s.checkRefused("no space left in state_dir", run, s.newDir(), "no space left for the images", "state_dir", "free some")
		s.checkKeepsRunning(run)
	}
	s.check(syscall.Mount("", state, "", syscall.MS_REMOUNT, "size=100m"))
	s.check(s.engine.CheckpointTo(s.ctx, run, s.newDir(), false))
	s.checkKeepsRunning(run)
	s.remove(c) // by the shim that has this configuration
}

// requestCheckpoint asks for a checkpoint as containerd does, without a pause
// before.
func (s *scenario) requestCheckpoint(run *engine.Run, dir string) error {
	return s.requestCheckpointWithin(s.ctx, run, dir)
}

// requestCheckpointWithin is requestCheckpoint by an engine that gives up.
func (s *scenario) requestCheckpointWithin(ctx context.Context, run *engine.Run, dir string) error {
	options, err := typeurl.MarshalAnyToProto(&runcoptions.CheckpointOptions{ImagePath: dir})
	if err != nil {
		return err
	}
	_, err = s.engine.Client.TaskService().Checkpoint(ctx, &tasks.CheckpointTaskRequest{ContainerID: run.ID(), Options: options})
	return errgrpc.ToNative(err)
}

// checkRefused checks that a checkpoint is refused by a sentence with the
// words.
func (s *scenario) checkRefused(what string, run *engine.Run, dir string, words ...string) {
	s.Helper()
	err := s.requestCheckpoint(run, dir)
	if err == nil {
		s.Errorf("%s: a checkpoint was made", what)
		return
	}
	s.Logf("%s: %v", what, err)
	s.checkHasCode(err)
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			s.Errorf("%s: the refusal does not say %q: %v", what, word, err)
		}
	}
}

// killAgent kills the agent in the guest of a pod.
func (s *scenario) killAgent(p *pod) {
	s.Helper()
	agent := s.shellInGuest(p, "cat /sys/fs/cgroup/cgroup.procs | while read p; do readlink /proc/$p/exe | grep -q kata-checkpoint-agent && echo $p; done; true")
	if agent == "" {
		s.Fatal("there is no agent in the guest")
	}
	s.shellInGuest(p, "kill -9 "+strings.Join(strings.Fields(agent), " "))
}

// shellInGuest runs a script in the guest of a pod.
func (s *scenario) shellInGuest(p *pod, script string) string {
	s.Helper()
	out, status, err := s.testbed.GuestExec(s.ctx, p.sandbox.ID(), script)
	s.check(err)
	if status != 0 {
		s.Fatalf("in the guest: %s: status %d: %s", script, status, out)
	}
	return strings.TrimSpace(string(out))
}
