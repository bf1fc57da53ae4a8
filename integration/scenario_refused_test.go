package integration

import (
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

// refused: a checkpoint that cannot be made is refused by a sentence that says what to do, and costs the container nothing.
func refused(s *scenario) {
	pod := s.pod()
	c := pod.create(counter("c"))
	run := s.run(c)
	s.printed(run.Output, workload.Ticks, 3)

	// The guest, as if its kernel had been built otherwise. The agent asks a kernel once.
	s.inGuest(pod, "mount -t tmpfs none /proc/sys/kernel")
	s.refuses("a kernel without CHECKPOINT_RESTORE", run, s.dir(), "CONFIG_CHECKPOINT_RESTORE", "configs/kernel")
	s.inGuest(pod, "umount /proc/sys/kernel")
	s.goesOn(run)
	// An agent that has died is started again, and asks again.
	s.endAgent(pod)
	s.check(s.engine.CheckpointTo(s.ctx, run, s.dir(), false))
	s.goesOn(run)
	s.step("the guest")

	// The directory for the image set.
	s.refuses("a directory that does not exist", run, filepath.Join(s.dir(), "none"), "does not exist", "create it")
	for name, mount := range map[string]struct {
		flags   uintptr
		options string
		words   []string
	}{
		"a directory that cannot be written to": {syscall.MS_RDONLY, "", []string{"cannot be written to", "read-only file system"}},
		"a full file system":                    {0, "size=1m", []string{"no room", "make room", "no space left on device"}},
	} {
		dir := s.dir()
		s.check(syscall.Mount("tmpfs", dir, "tmpfs", mount.flags, mount.options))
		s.refuses(name, run, dir, mount.words...)
		left, err := os.ReadDir(dir)
		s.check(err)
		if len(left) > 0 {
			s.Errorf("%s: the refused checkpoint left %v", name, left)
		}
		s.check(syscall.Unmount(dir, 0))
		s.goesOn(run)
	}
	s.step("the directory")

	// The workload.
	c = pod.create(engine.Container{ID: "io-uring", Args: []string{workload.Path, "io-uring"}})
	uring := s.run(c)
	s.printed(uring.Output, workload.Rounds, 2)
	s.refuses("io_uring", uring, s.dir(), "io_uring", "workload")
	s.goesOn(uring)
	if err := s.engine.CheckpointTo(s.ctx, uring, s.dir(), false); err == nil || !strings.Contains(err.Error(), "io_uring") { // which pauses it first
		s.Errorf("io_uring, by a client of containerd's: %v", err)
	}
	s.goesOn(uring)
	s.removed(c)
	listener := pod.create(engine.Container{ID: "listener", Args: []string{workload.Path, "peer", "--listen"}})
	outside := s.run(listener)
	s.says(outside.Output, 0, "listening")
	c = pod.create(engine.Container{ID: "peer", Args: []string{workload.Path, "peer"}})
	peer := s.run(c)
	s.printed(peer.Output, workload.Rounds, 2)
	s.refuses("a unix socket connected to outside", peer, s.dir(), "unix socket", "outside of the container", "close the connection")
	s.goesOn(peer)
	s.removed(c)
	s.removed(listener)
	c = pod.create(pod.sharing(engine.Container{ID: "strayed", Args: []string{"sh", "-c", "(sleep 1000 &); exec " + workload.Path + " counter --shm /dev/shm/strayed"}}))
	strayed := s.run(c)
	s.printed(strayed.Output, workload.Ticks, 2)
	s.refuses("a process that has strayed to its pod", strayed, s.dir(), "sleep (pid", "lost its parent", "subreaper", "pid namespace of its own")
	s.goesOn(strayed)
	s.removed(c)
	s.step("the workload")

	// The time.
	c = pod.create(counter("not-yet"))
	task, err := c.NewTask(s.ctx, cio.NullIO)
	s.check(err)
	s.refuses("a task that was not started", &engine.Run{Task: task}, s.dir(), "has not been started")
	_, err = task.Delete(s.ctx, client.WithProcessKill)
	s.check(err)
	second := make(chan error, 1)
	first := make(chan error, 1)
	dir := s.dir()
	go func() { first <- s.ask(run, dir) }()
	if !s.eventually(settleTimeout, func() bool {
		status, err := run.Status(s.ctx)
		return err == nil && status.Status == client.Paused
	}) {
		s.Fatal("a checkpoint does not begin")
	}
	go func() { second <- s.ask(run, s.dir()) }()
	err = <-second
	if err == nil || !strings.Contains(err.Error(), "under way") {
		s.Errorf("a second checkpoint meanwhile: %v", err)
	}
	s.Logf("a second checkpoint meanwhile: %v", err)
	s.check(<-first)
	s.goesOn(run)
	s.check(run.Kill(s.ctx, syscall.SIGKILL))
	_, err = run.Exit(s.ctx)
	s.check(err)
	s.refuses("a task that has stopped", run, s.dir(), "has stopped")
	_, err = run.Delete(s.ctx)
	s.check(err)
	s.step("the time")
}

// refusedWithoutAgent: where no agent is in the guest, containers run if the operator wants that, and cannot be checkpointed.
func refusedWithoutAgent(s *scenario) {
	s.configure("agent_port", 10749)
	s.configure("agent_timeout", "1s")
	c := s.create(counter("strict"))
	if _, err := s.engine.Start(s.ctx, c); err == nil || !strings.Contains(err.Error(), "agent") || !strings.Contains(err.Error(), "guest_agent") {
		s.Errorf("a start without an agent: %v", err)
	} else {
		s.Logf("refused: %v", err)
	}
	s.removed(c)
	s.configure("guest_agent", "optional")
	run := s.run(s.create(counter("c")))
	s.printed(run.Output, workload.Ticks, 3)
	s.refuses("no agent", run, s.dir(), "agent")
	s.goesOn(run)
}

// refusedNoRoom: the file system on which the guest leaves its images is full before the last of them is written.
func refusedNoRoom(s *scenario) {
	state, err := os.MkdirTemp("/var/tmp", "kata-checkpoint-state-")
	s.check(err)
	s.check(syscall.Mount("tmpfs", state, "tmpfs", 0, "size=1m"))
	s.later(func() error { return errors.Join(syscall.Unmount(state, 0), os.Remove(state)) })
	s.configure("state_dir", state)
	c := s.create(counter("c"))
	run := s.run(c)
	s.printed(run.Output, workload.Ticks, 3)
	for range 2 { // the first one leaves nothing that the second one would find in its way
		s.refuses("no room in state_dir", run, s.dir(), "no room", "state_dir", "make room")
		s.goesOn(run)
	}
	s.check(syscall.Mount("", state, "", syscall.MS_REMOUNT, "size=100m"))
	s.check(s.engine.CheckpointTo(s.ctx, run, s.dir(), false))
	s.goesOn(run)
	s.removed(c) // by the shim that has this configuration
}

// ask asks for a checkpoint as containerd does, without a pause before.
func (s *scenario) ask(run *engine.Run, dir string) error {
	options, err := typeurl.MarshalAnyToProto(&runcoptions.CheckpointOptions{ImagePath: dir})
	if err != nil {
		return err
	}
	_, err = s.engine.Client.TaskService().Checkpoint(s.ctx, &tasks.CheckpointTaskRequest{ContainerID: run.ID(), Options: options})
	return errgrpc.ToNative(err)
}

// refuses checks that a checkpoint is refused by a sentence with the words.
func (s *scenario) refuses(what string, run *engine.Run, dir string, words ...string) {
	s.Helper()
	err := s.ask(run, dir)
	if err == nil {
		s.Errorf("%s: a checkpoint was made", what)
		return
	}
	s.Logf("%s: %v", what, err)
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			s.Errorf("%s: the refusal does not say %q: %v", what, word, err)
		}
	}
}

// goesOn checks that a workload runs, and has lost nothing.
func (s *scenario) goesOn(run *engine.Run) {
	s.Helper()
	s.status(run, client.Running)
	at := len(run.Output.Lines())
	s.check(run.Output.Wait(s.ctx, func(lines []string) (bool, error) { return len(lines) > at+2, nil }))
	parse := workload.Rounds
	if strings.HasPrefix(run.Output.Lines()[at], "tick") {
		parse = workload.Ticks
	}
	s.consecutive(1, s.numbers(run.Output, parse))
}

// endAgent kills the agent in the guest of a pod.
func (s *scenario) endAgent(p *pod) {
	s.Helper()
	agent := s.inGuest(p, "cat /sys/fs/cgroup/cgroup.procs | while read p; do readlink /proc/$p/exe | grep -q kata-checkpoint-agent && echo $p; done; true")
	if agent == "" {
		s.Fatal("there is no agent in the guest")
	}
	s.inGuest(p, "kill -9 "+strings.Join(strings.Fields(agent), " "))
}

// inGuest runs a script in the guest of a pod.
func (s *scenario) inGuest(p *pod, script string) string {
	s.Helper()
	out, status, err := s.bed.GuestExec(s.ctx, p.sandbox.ID(), script)
	s.check(err)
	if status != 0 {
		s.Fatalf("in the guest: %s: status %d: %s", script, status, out)
	}
	return strings.TrimSpace(string(out))
}
