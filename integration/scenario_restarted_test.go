// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"io"
	"os"
	"path/filepath"
	"syscall"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// killContainerd ends containerd at once, and makes sure that the scenario ends
// with one that runs.
func (s *scenario) killContainerd() {
	s.Helper()
	s.check(s.testbed.KillContainerd(s.ctx))
	away := s.testbed.Containerd
	s.Cleanup(func() {
		if s.testbed.Containerd == away {
			s.startContainerd()
		}
	})
	s.step("killed containerd")
}

// startContainerd starts containerd again, and waits for the tasks that keep
// running.
func (s *scenario) startContainerd(runs ...*engine.Run) {
	s.Helper()
	s.startContainerdWith()
	for _, run := range runs {
		s.check(run.Rejoin(s.ctx))
	}
	s.step("started containerd again")
}

// startContainerdWith starts containerd again, with more in its environment.
func (s *scenario) startContainerdWith(env ...string) {
	s.Helper()
	s.check(s.testbed.StartContainerd(s.ctx, env...))
	s.check(s.engine.Reconnect())
	s.events.Rejoin(s.ctx, s.engine)
}

// containerdKilledIdle: containers of a pod keep running while containerd is
// away, and one ends. The next containerd finds all of it, and continues from
// there.
func containerdKilledIdle(s *scenario) {
	pod := s.startPod()
	c := pod.create(counter("c"))
	first := s.run(c)
	s.waitNumbers(first.Output, workload.Ticks, 5)
	input, press := io.Pipe()
	defer press.Close()
	ending, err := s.engine.With(engine.Streams{Stdin: input}).Start(s.ctx, pod.create(engine.Container{ID: "ending", Args: []string{
		"sh", "-c", `echo round 1; read line; echo round 2; exit 7`,
	}}))
	s.check(err)
	s.waitNumbers(ending.Output, workload.Rounds, 1)

	s.killContainerd()
	_, err = press.Write([]byte("\n"))
	s.check(err)
	s.waitNumbers(ending.Output, workload.Rounds, 2)
	s.checkKeepsCounting(first)
	s.startContainerd(first, ending)
	s.checkStatus(first, client.Running)
	s.checkKeepsCounting(first)
	s.checkStatus(ending, client.Stopped)
	s.waitExit(ending, 7)
	s.shell(first, "true")
	s.step("both are what they were")

	dir := s.checkpoint(first, true)
	s.waitExit(first, 137)
	s.checkExitEvents(c, 137)
	before := s.printedNumbers(first.Output, workload.Ticks)
	restored := s.restore(c, dir)
	s.checkConsecutive(1, append(before, s.waitNumbers(restored.Output, workload.Ticks, 5)...))

	// A restored one is found like any other.
	s.killContainerd()
	s.startContainerd(restored)
	s.checkStatus(restored, client.Running)
	s.check(restored.Kill(s.ctx, syscall.SIGKILL))
	s.waitExit(restored, 137)
	s.checkExitEvents(c, 137, 137)
}

// containerdKilledPaused: a pause outlives containerd.
func containerdKilledPaused(s *scenario) {
	c := s.create(counter("c"))
	first := s.run(c)
	s.waitNumbers(first.Output, workload.Ticks, 5)

	s.check(first.Pause(s.ctx))
	s.killContainerd()
	s.checkSilent(first.Output)
	s.startContainerd(first)
	s.checkStatus(first, client.Paused)
	s.checkSilent(first.Output)
	s.check(first.Resume(s.ctx))
	s.checkStatus(first, client.Running)
	s.checkKeepsCounting(first)
	s.step("resumed by the next containerd")

	s.check(first.Pause(s.ctx))
	s.killContainerd()
	s.startContainerd(first)
	dir := s.checkpoint(first, true)
	s.waitExit(first, 137)
	s.checkExitEvents(c, 137)
	before := s.printedNumbers(first.Output, workload.Ticks)
	restored := s.restore(c, dir)
	s.checkStatus(restored, client.Running)
	s.checkConsecutive(1, append(before, s.waitNumbers(restored.Output, workload.Ticks, 5)...))
	s.checkOtherVM(first, restored)
}

// containerdKilledMidCheckpoint: a checkpoint ends with the containerd that has
// asked for it. Its container keeps running, nothing of the image set is left,
// and the next containerd's log says what has happened.
func containerdKilledMidCheckpoint(s *scenario) {
	c := s.create(counter("c"))
	first := s.run(c)
	s.waitNumbers(first.Output, workload.Ticks, 5)
	dir, other := s.newDir(), s.newDir()
	for _, checkpoint := range []struct {
		phase string
		ask   func() error
		whole bool // the image set is, and stays
	}{
		// With a directory of the caller's, and with a temporary one of
		// containerd's, which is removed.
		{phase: "checkpoint-prepare", ask: func() error { return s.engine.CheckpointTo(s.ctx, first, dir, true) }},
		{phase: "checkpoint-copy-images", ask: func() error { return s.engine.CheckpointByDefault(s.ctx, first, other) }},
		{phase: "checkpoint-commit", ask: func() error { return s.engine.CheckpointTo(s.ctx, first, dir, true) }, whole: true},
	} {
		s.stopAt(checkpoint.phase)
		answer := make(chan error, 1)
		go func() { answer <- checkpoint.ask() }()
		s.waitStoppedAt(checkpoint.phase, answer)
		s.checkSilent(first.Output)
		s.killContainerd()
		if err := <-answer; err == nil {
			s.Error("a checkpoint has succeeded without containerd")
		}
		s.checkKeepsCounting(first)
		s.startContainerd(first)
		s.checkStatus(first, client.Running)
		s.checkKeepsCounting(first)
		if !checkpoint.whole {
			s.checkEmpty(dir)
		}
		s.step("it keeps running")
	}
	for _, words := range []string{"failed to checkpoint container", "resumed container that its caller paused for an abandoned checkpoint"} {
		if !s.eventually(settleTimeout, func() bool { return s.hasLogged(words) }) {
			s.Errorf("the log does not say: %s", words)
		}
	}

	s.check(s.engine.CheckpointTo(s.ctx, first, dir, true))
	s.step("checkpointed")
	s.waitExit(first, 137)
	s.checkExitEvents(c, 137)
	before := s.printedNumbers(first.Output, workload.Ticks)
	restored := s.restore(c, dir)
	s.checkConsecutive(1, append(before, s.waitNumbers(restored.Output, workload.Ticks, 5)...))
	s.checkOtherVM(first, restored)
}

// containerdKilledMidRestore: a restore ends with the containerd that has asked
// for it. What there is of its container can be removed by the next one,
// containerd's copy of the image set is gone, and the same container can be
// restored again.
func containerdKilledMidRestore(s *scenario) {
	counting := counter("c")
	// Kata removes what of a sandbox it thinks is its own.
	volume := s.newDir()
	kept := filepath.Join(volume, "kept")
	s.check(os.WriteFile(kept, []byte("data"), 0o600))
	counting.Mounts = []specs.Mount{{Type: "bind", Source: volume, Destination: "/data", Options: []string{"rbind", "rw"}}}
	c := s.create(counting)
	first := s.run(c)
	s.waitNumbers(first.Output, workload.Ticks, 5)
	dir := s.checkpoint(first, true)
	s.waitExit(first, 137)
	before := s.printedNumbers(first.Output, workload.Ticks)

	for _, phase := range []string{"restore-stage-images", "restore-create", "restore-start"} {
		s.stopAt(phase)
		answer := make(chan error, 1)
		go func() {
			_, err := s.engine.Restore(s.ctx, c, dir)
			answer <- err
		}()
		s.waitStoppedAt(phase, answer)
		s.killContainerd()
		if err := <-answer; err == nil {
			s.Error("a restore has succeeded without containerd")
		}
		s.startContainerd()
		s.checkNotRunning(c)
		s.check(s.engine.EndTask(s.ctx, c))
		s.step("removed what there was of it")
		s.checkNothingRuns()
		if data, err := os.ReadFile(kept); err != nil || string(data) != "data" {
			s.Fatalf("the volume's file: %q, %v", data, err)
		}
	}

	restored := s.restore(c, dir)
	s.checkConsecutive(1, append(before, s.waitNumbers(restored.Output, workload.Ticks, 5)...))
	s.checkOtherVM(first, restored)
}

// checkNotRunning checks that a container has no task, or one that does not
// run.
func (s *scenario) checkNotRunning(c client.Container) {
	s.Helper()
	task, err := c.Task(s.ctx, nil)
	if errdefs.IsNotFound(err) {
		return
	}
	s.check(err)
	status, err := task.Status(s.ctx)
	s.check(err)
	if status.Status != client.Created && status.Status != client.Stopped {
		s.Errorf("%s is %s", c.ID(), status.Status)
	}
}
