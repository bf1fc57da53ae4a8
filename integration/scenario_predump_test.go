// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/client"

	"github.com/kata-checkpoint/kata-checkpoint/integration/cri"
	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
)

// firstPreDump is the phase that ends with the first copy of the memory.
const firstPreDump = "checkpoint-pre-dump-1"

// preDumps are a container's annotations.
func preDumps(rounds string) map[string]string {
	return map[string]string{annotations.PreDumpKey: rounds}
}

// preDumpLife: the memory of a container is copied while it runs, and the
// checkpoint is as any other: it comes back in three cycles, by a CRI's archive as
// well, with every byte of its memory, whatever it is that writes there; and
// whatever is killed between two rounds leaves nothing behind.
func preDumpLife(s *scenario) {
	c := s.create(engine.Container{
		ID: "c", Args: []string{workload.Path, "memory", "--mib", "48", "--shm-mib", "4", "--every", "50ms"}, Annotations: preDumps("3"),
	})
	run := s.run(c)
	boots := map[string]bool{}
	var seen []int
	for cycle := range 3 {
		s.waitNumbers(run.Output, workload.Rounds, 4)
		boots[s.bootID(run)] = true
		dir := s.newDir()
		s.whileAt(firstPreDump, func() error { return s.engine.CheckpointTo(s.ctx, run, dir, true) }, func() {
			at := len(s.printedNumbers(run.Output, workload.Rounds))
			s.waitNumbers(run.Output, workload.Rounds, at+3)
			s.checkStatus(run, client.Paused)
			s.shell(run, "true")
		})
		s.waitExit(run, 137)
		s.checkPreDumped(dir)
		seen = append(seen, s.printedNumbers(run.Output, workload.Rounds)...)
		run = s.restore(c, dir)
		s.step("cycle %d", cycle+1)
	}
	s.checkConsecutive(1, append(seen, s.waitNumbers(run.Output, workload.Rounds, 5)...))
	if boots[s.bootID(run)] = true; len(boots) != 4 {
		s.Errorf("it was in the VMs %v", boots)
	}

	// A restored one, left running, and its image set beside it.
	dir := s.checkpoint(run, false)
	s.checkPreDumped(dir)
	s.checkStatus(run, client.Running)
	rounds := s.waitNumbers(run.Output, workload.Rounds, len(s.printedNumbers(run.Output, workload.Rounds))+3)
	s.checkConsecutive(rounds[0], rounds)
	s.remove(c)
	other := s.create(engine.Container{ID: "other", Args: []string{workload.Path, "memory", "--mib", "48", "--shm-mib", "4", "--every", "50ms"}})
	again := s.restore(other, dir)
	rounds = s.waitNumbers(again.Output, workload.Rounds, 3)
	s.checkConsecutive(rounds[0], rounds)
	s.remove(other)

	s.preDumpOfATree()
	s.preDumpInAPod()
	s.preDumpKilled()
}

// checkPreDumped checks that an image set was made with pre-dumps, and is flat.
func (s *scenario) checkPreDumped(dir string) {
	s.Helper()
	data, err := os.ReadFile(filepath.Join(dir, imageset.ManifestName))
	s.check(err)
	var m imageset.Manifest
	s.check(json.Unmarshal(data, &m))
	rounds := 0
	for _, p := range m.Phases {
		if strings.HasPrefix(p.Name, "pre-dump ") {
			rounds++
		}
		s.Logf("%8.0f ms  %s", float64(p.Duration)/float64(time.Millisecond), p.Name)
	}
	if rounds == 0 {
		s.Errorf("%s was made without pre-dumps", dir)
	}
	s.check(verify(dir, s.newDir()))
}

// preDumpOfATree has one of each kind of kernel object, in several processes.
func (s *scenario) preDumpOfATree() {
	s.Helper()
	c := s.create(engine.Container{ID: "tree", Args: []string{workload.Path, "tree"}, Annotations: preDumps("2")})
	run := s.run(c)
	s.waitNumbers(run.Output, workload.Rounds, 3)
	dir := s.checkpoint(run, true)
	s.waitExit(run, 137)
	s.checkPreDumped(dir)
	before := s.printedNumbers(run.Output, workload.Rounds)
	restored := s.restore(c, dir)
	s.checkConsecutive(1, append(before, s.waitNumbers(restored.Output, workload.Rounds, 3)...))
	s.remove(c)
	s.step("a tree of processes")
}

// preDumpInAPod has the CRI checkpoint a counter with files in its root file
// system, whose diff is of the instant of the dump.
func (s *scenario) preDumpInAPod() {
	s.Helper()
	s.configure("pre_dump_cri", "auto")
	pod := s.runPod("before", cri.PodSpec{})
	c := s.runIn(pod, counterNamed("c"))
	archive := s.archive("c")
	earliest := len(s.waitTicks(c, 5))
	s.whileAt(firstPreDump, func() error { return c.Checkpoint(s.ctx, archive) }, func() {
		earliest = len(s.waitTicks(c, len(s.waitTicks(c, 5))+5))
	})
	latest := len(s.waitTicks(c, 5))
	s.checkConsecutive(1, s.waitTicks(c, latest+5))
	s.check(pod.Remove(s.ctx))
	pod = s.runPod("after", cri.PodSpec{Annotations: fromArchive(archive)})
	s.checkContinuesBetween(s.runIn(pod, counterNamed("c")), earliest, latest)
	s.check(pod.Remove(s.ctx))
	s.step("in a pod")
}

// preDumpKilled kills each part between two rounds.
func (s *scenario) preDumpKilled() {
	s.Helper()
	k := &killer{scenario: s, targets: s.newDir(), c: s.create(engine.Container{
		ID: "killed", Args: []string{workload.Path, "memory", "--mib", "16", "--shm-mib", "1", "--loopback"}, Annotations: preDumps("2"),
	})}
	for _, victim := range []string{"criu", "agent", "shim", "kata", "vm"} {
		t := trial{point{operation: "checkpoint", phase: "pre-dump-1"}, victim}
		if victim == "criu" {
			t.point = point{operation: "checkpoint", phase: "prepare-pre-dump", guest: true}
		}
		k.ensureRunning()
		dir := filepath.Join(k.targets, victim)
		s.check(os.Mkdir(dir, 0o700))
		ours := k.sockets()
		k.arm(t)
		answer := make(chan error, 1)
		go func() { answer <- s.engine.CheckpointTo(s.ctx, k.run, dir, false) }()
		k.reach(t, answer)
		if victim == "criu" {
			k.shellInGuestOf(k.c.ID(), findAgent+"rm "+guestStops+"/*.reached\n"+findCRIU+"kill -9 $criu")
		} else {
			k.kill(t)
		}
		err := k.waitAnswer(t, answer)
		if t.containerSurvives() {
			// The rounds are no part of the checkpoint: it is made without them.
			if err != nil {
				s.Errorf("%s: %v", t, err)
			}
			k.checkKeepsRunning(k.run)
		} else {
			k.checkTaskEnds(t, ours)
		}
		k.checkWholeOrNothing(t, dir, err == nil)
		s.step("%s: %v", t, err)
	}
}

// preDumpUserPause: a pause that no checkpoint follows freezes, a moment later, or
// at once if it is of one of several containers of a pod; a Resume that comes
// before leaves nothing behind; and what cannot be of one instant is refused.
func preDumpUserPause(s *scenario) {
	spec := counter("c")
	spec.Annotations = preDumps("auto")
	c := s.create(spec)
	run := s.run(c)
	s.waitNumbers(run.Output, workload.Ticks, 5)

	s.check(run.Pause(s.ctx))
	s.checkStatus(run, client.Paused)
	s.waitSilent(run.Output)
	s.checkStatus(run, client.Paused)
	s.checkSilent(run.Output)
	dir := s.checkpoint(run, false)
	s.checkSilent(run.Output)
	s.checkStatus(run, client.Paused)
	s.check(run.Resume(s.ctx))
	s.checkKeepsCounting(run)
	s.step("a user's pause freezes")

	s.check(run.Pause(s.ctx))
	s.check(run.Resume(s.ctx))
	s.checkStatus(run, client.Running)
	at := len(s.printedNumbers(run.Output, workload.Ticks))
	s.checkConsecutive(1, s.waitNumbers(run.Output, workload.Ticks, at+20)) // two seconds
	s.checkStatus(run, client.Running)
	s.step("a pause that was ended at once freezes nothing")

	_, err := s.engine.Commit(s.ctx, c, "checkpoint.test/refused:latest")
	if err == nil || !strings.Contains(err.Error(), "ctr task checkpoint --image-path") {
		s.Errorf("`ctr containers checkpoint --rw --task` of a container with pre-dumps: %v", err)
	}
	s.checkKeepsCounting(run)
	s.checkStatus(run, client.Running)
	s.check(s.engine.EndTask(s.ctx, c))
	s.step("files and memory of different instants are refused")

	s.check(verify(dir, s.newDir()))

	pod := s.startPod()
	var runs []*engine.Run
	for _, name := range []string{"a", "b"} {
		spec := counter(name)
		spec.Args = append(spec.Args, "--shm", "/dev/shm/"+name)
		spec.Annotations = preDumps("auto")
		r := s.run(pod.create(spec))
		s.waitNumbers(r.Output, workload.Ticks, 3)
		runs = append(runs, r)
	}
	for _, r := range runs {
		s.check(r.Pause(s.ctx))
	}
	for _, r := range runs {
		s.checkSilent(r.Output)
		s.checkStatus(r, client.Paused)
	}
	// While one is paused, the other one's checkpoint thaws nothing.
	s.check(runs[0].Resume(s.ctx))
	s.checkKeepsCounting(runs[0])
	s.checkpoint(runs[0], false)
	s.checkSilent(runs[1].Output)
	s.check(runs[1].Resume(s.ctx))
	for _, r := range runs {
		s.checkKeepsCounting(r)
	}
	s.step("the containers of a pod are held together")
}

// waitSilent waits until a task prints nothing for a second.
func (s *scenario) waitSilent(out *engine.Output) {
	s.Helper()
	if !s.eventually(settleTimeout, func() bool {
		n := len(out.Lines())
		ctx, cancel := context.WithTimeout(s.ctx, time.Second)
		defer cancel()
		return out.Wait(ctx, func(lines []string) (bool, error) { return len(lines) > n, nil }) != nil
	}) {
		s.Error("it prints all the time")
	}
}
