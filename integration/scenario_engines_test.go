// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"encoding/json"
	"os"
	"path/filepath"

	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
)

// workPath: CRIU's log and statistics go where `ctr task checkpoint
// --work-path` says, and are no part of the image set. The options that the
// engine sends are in the manifest, and the restore applies them again.
func workPath(s *scenario) {
	c := s.create(engine.Container{ID: "c", Args: []string{workload.Path, "lock"}})
	first := s.run(c)
	s.waitNumbers(first.Output, workload.Rounds, 2)

	dir, work := s.newDir(), filepath.Join(s.newDir(), "work")
	// ctr has no option for file locks: they are always included.
	options := &runcoptions.CheckpointOptions{Exit: true, WorkPath: work, ExternalUnixSockets: true, CgroupsMode: "ignore"}
	s.check(s.engine.CheckpointWith(s.ctx, first, dir, options))
	s.step("checkpointed with a work path")
	s.waitExit(first, 137)
	for _, name := range []string{"dump.log", "stats-dump"} {
		if info, err := os.Stat(filepath.Join(work, name)); err != nil || info.Size() == 0 {
			s.Errorf("%s in the work path: %v", name, err)
		}
		if _, err := os.Stat(filepath.Join(dir, name)); err == nil {
			s.Errorf("the image set has %s, too", name)
		}
	}
	var manifest struct{ Options map[string]any }
	data, err := os.ReadFile(filepath.Join(dir, "kata-checkpoint.json"))
	s.check(err)
	s.check(json.Unmarshal(data, &manifest))
	if o := manifest.Options; len(o) != 2 || o["fileLocks"] != true || o["externalUnixSockets"] != true {
		s.Errorf("the manifest has the options %v", o)
	}

	before := s.printedNumbers(first.Output, workload.Rounds)
	restored := s.restore(c, dir)
	// The program ends when its lock is gone.
	s.checkConsecutive(1, append(before, s.waitNumbers(restored.Output, workload.Rounds, 5)...))
	s.checkOtherVM(first, restored)

	// By the binary, and without an end.
	work = s.newDir()
	s.ctr("task", "checkpoint", "--image-path", s.newDir(), "--work-path", work, s.startCounter().ID())
	if _, err := os.Stat(filepath.Join(work, "dump.log")); err != nil {
		s.Error(err)
	}
}

// annotationLeaveRunning: where an engine cannot say what is to become of a
// container, its annotation does; it overrides what the engine says, too.
func annotationLeaveRunning(s *scenario) {
	c := counter("c")
	c.Annotations = map[string]string{annotations.AfterKey: "leave-running"}
	container := s.create(c)
	run := s.run(container)
	s.waitNumbers(run.Output, workload.Ticks, 5)
	s.check(s.engine.CheckpointByDefault(s.ctx, run, s.newDir()))
	s.step("checkpointed as nerdctl does")
	s.checkKeepsRunning(run)
	dir := s.newDir()
	s.ctr("task", "checkpoint", "--exit", "--image-path", dir, container.ID())
	s.checkKeepsRunning(run)
	s.checkStateEvents(container, "paused", "checkpointed", "resumed", "paused", "checkpointed "+dir, "resumed")
	s.checkExitEvents(container)
	s.remove(container)

	// The CRI sends no options either, and its containers keep running without
	// an annotation.
	container = s.startPod().create(counter("cri"))
	run = s.run(container)
	s.waitNumbers(run.Output, workload.Ticks, 5)
	s.check(s.engine.CheckpointByDefault(s.ctx, run, s.newDir()))
	s.checkKeepsRunning(run)
	s.checkStateEvents(container, "paused", "checkpointed", "resumed")
	s.checkExitEvents(container)
}

// nerdctlDefaultStops: `nerdctl checkpoint create` without a flag stops a
// container, and `nerdctl start --checkpoint` brings it back, again and again.
// nerdctl keeps a checkpoint in a directory of its name, where nothing but our
// files are.
func nerdctlDefaultStops(s *scenario) {
	checkpoints := s.newDir()
	c := s.create(counter("c"))
	run := s.run(c)
	var all []int
	for _, name := range []string{"one", "two"} {
		s.waitNumbers(run.Output, workload.Ticks, 5)
		dir := filepath.Join(checkpoints, name)
		s.check(os.Mkdir(dir, 0o700))
		s.check(s.engine.CheckpointByDefault(s.ctx, run, dir))
		s.step("checkpointed as nerdctl does")
		// It is shown as exited until nerdctl deletes the task, when the
		// container starts again.
		s.checkStatus(run, client.Stopped)
		s.waitExit(run, 137)
		all = append(all, s.printedNumbers(run.Output, workload.Ticks)...)
		before := run
		run = s.restore(c, dir)
		s.waitNumbers(run.Output, workload.Ticks, 3)
		s.checkOtherVM(before, run)
	}
	s.checkConsecutive(1, append(all, s.waitNumbers(run.Output, workload.Ticks, 5)...))
	s.checkStateEvents(c, "paused", "checkpointed", "paused", "checkpointed")
	s.checkExitEvents(c, 137, 137)
}

// ctrImageRoundtrip: a checkpoint by the binary into an image of containerd's
// store survives its container, and a container of another name continues from
// it, with its memory and its writable layer.
func ctrImageRoundtrip(s *scenario) {
	c := s.create(counter("c"))
	first := s.run(c)
	s.waitNumbers(first.Output, workload.Ticks, 5)
	const reference = "checkpoint.test/roundtrip:latest"
	s.ctr("containers", "checkpoint", "--rw", "--task", c.ID(), reference)
	s.checkKeepsRunning(first)
	s.checkStateEvents(c, "paused", "checkpointed", "resumed")
	at := len(s.printedNumbers(first.Output, workload.Ticks))
	s.remove(c)

	id := s.id("other")
	s.ctr("containers", "restore", "--rw", "--live", id, reference)
	restored, err := s.engine.Client.LoadContainer(s.ctx, id)
	s.check(err)
	out := engine.NewOutput()
	task, err := restored.Task(s.ctx, cio.NewAttach(cio.WithStreams(nil, out, nil)))
	s.check(err)
	run := &engine.Run{Task: task, Output: out}
	s.checkStatus(run, client.Running)
	// The counter ends when the numbers in its memory and in its files do not
	// agree.
	after := s.waitNumbers(out, workload.Ticks, 5)
	s.checkConsecutive(after[0], after)
	if last := after[0] - 1; last < 5 || last > at {
		s.Errorf("the restored counter continues after %d; the first one had come to %d", last, at)
	}
	if boot := s.shell(run, "cat /proc/sys/kernel/random/boot_id"); boot[0] == s.bootID(first) {
		s.Errorf("restored in the same boot %s", boot)
	}
	s.check(task.Kill(s.ctx, 9))
	_, err = task.Delete(s.ctx, client.WithProcessKill) // with the named pipes that ctr made
	s.check(err)
	s.checkExitEvents(restored, 137)
	s.ctr("images", "rm", reference)
}

// startCounter runs another counter.
func (s *scenario) startCounter() client.Container {
	s.Helper()
	c := s.create(counter("counting"))
	s.waitNumbers(s.run(c).Output, workload.Ticks, 2)
	return c
}
