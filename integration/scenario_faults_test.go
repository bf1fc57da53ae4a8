// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/oci"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// amounts are what a file system or a process has left, until it is enough: each
// fails at another step.
var amounts = []int64{0, 1, 2, 3, 5, 8, 13, 22, 38, 65, 110, 200, 400, 1000}

// sweep calls try with more and more of what is short until it works, and checks
// that it has failed before.
func (s *scenario) sweep(what string, try func(n int64) error) {
	s.Helper()
	var failures []string
	for _, n := range amounts {
		err := try(n)
		if err == nil {
			if len(failures) < 3 {
				s.Errorf("%s: it worked with %d, after %d failures", what, n, len(failures))
			}
			for _, failure := range slices.Compact(failures) {
				s.Logf("%s: %s", what, failure)
			}
			s.step("%s: it works with %d more", what, n)
			return
		}
		if text := err.Error(); strings.Contains(text, "\n") {
			s.Errorf("%s: with %d the error has more than one line: %s", what, n, text)
		}
		failures = append(failures, err.Error())
	}
	s.Fatalf("%s: it does not work with %d, either: %s", what, amounts[len(amounts)-1], failures[len(failures)-1])
}

// smallFS is a file system whose size changes.
type smallFS struct {
	*scenario
	dir string
}

func (s *scenario) newSmallFS() smallFS {
	s.Helper()
	dir, err := os.MkdirTemp("/var/tmp", "kata-checkpoint-small-")
	s.check(err)
	f := smallFS{s, dir}
	s.check(syscall.Mount("tmpfs", dir, "tmpfs", 0, "mode=700,"+roomy))
	s.afterContainers(func() error { return errors.Join(syscall.Unmount(dir, 0), os.Remove(dir)) })
	return f
}

// roomy are the options of a file system that lacks nothing.
const roomy = "size=1g,nr_inodes=100000"

func (f smallFS) remount(options string) {
	f.Helper()
	f.check(syscall.Mount("", f.dir, "", syscall.MS_REMOUNT, "mode=700,"+options))
}

// leave leaves so many times 16 KiB.
func (f smallFS) leave(n int64) {
	f.Helper()
	var st unix.Statfs_t
	f.check(unix.Statfs(f.dir, &st))
	used := int64(st.Blocks-st.Bfree) * st.Bsize
	f.remount(fmt.Sprintf("size=%d,nr_inodes=100000", max(used+n*16<<10, st.Bsize))) // 0 is unlimited
}

// leaveInodes leaves so many inodes.
func (f smallFS) leaveInodes(n int64) {
	f.Helper()
	var st unix.Statfs_t
	f.check(unix.Statfs(f.dir, &st))
	f.remount(fmt.Sprintf("size=1g,nr_inodes=%d", int64(st.Files-st.Ffree)+n))
}

// paths lists what there is, but for what operations leave on purpose: the node's
// key, and the logs of restores that failed.
func (f smallFS) paths() (out []string) {
	f.Helper()
	err := filepath.WalkDir(f.dir, func(path string, _ fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(path, f.dir)
		switch name {
		case "/restore-logs":
			return fs.SkipDir
		case "/unfinished", "/exchange": // what is in them counts
			return nil
		}
		if !strings.HasPrefix(name, "/signing-key.pem") || strings.Contains(strings.TrimPrefix(name, "/signing-key.pem"), "-") {
			out = append(out, name)
		}
		return nil
	})
	f.check(err)
	return out
}

// checkHas checks that there is what there was.
func (f smallFS) checkHas(what string, before []string) {
	f.Helper()
	var now []string
	if !f.eventually(settleTimeout, func() bool {
		now = f.paths()
		return slices.Equal(now, before)
	}) {
		f.Errorf("%s: there is %q, and was %q", what, now, before)
	}
}

// noRoomAtAnyStep: the file system of state_dir, or that of the image set, has no
// space or no inodes left at whatever step of a checkpoint or a restore. The
// container keeps running, an earlier image set stays whole, and nothing is left.
func noRoomAtAnyStep(s *scenario) {
	state, targets := s.newSmallFS(), s.newSmallFS()
	s.configure("state_dir", state.dir)
	dir := filepath.Join(targets.dir, "set")
	s.check(os.Mkdir(dir, 0o700))
	c := s.create(counter("c"))
	run := s.run(c)
	s.waitNumbers(run.Output, workload.Ticks, 3)

	whole := false
	for _, f := range []struct {
		what string
		fs   smallFS
		give func(n int64)
	}{
		{"inodes of state_dir", state, state.leaveInodes}, // there is no key yet, either
		{"space of state_dir", state, state.leave},
		{"inodes for the image set", targets, targets.leaveInodes},
		{"space for the image set", targets, targets.leave},
	} {
		s.sweep(f.what, func(n int64) error {
			inState, inTargets := state.paths(), targets.paths()
			f.give(n)
			err := s.requestCheckpoint(run, dir)
			f.fs.remount(roomy)
			what := fmt.Sprintf("%s, %d: %v", f.what, n, err)
			if err != nil {
				targets.checkHas(what, inTargets)
				s.checkSaysWhatToDo(what, err, "free", "remove files")
			}
			state.checkHas(what, inState)
			if whole = whole || err == nil; whole {
				s.check(verify(dir, s.newDir()))
			}
			s.checkKeepsRunning(run)
			return err
		})
	}

	// The counter's files are those of its end.
	dir = s.newDir()
	s.check(s.engine.CheckpointTo(s.ctx, run, dir, true))
	s.waitExit(run, 137)
	for _, r := range []struct {
		what string
		give func(n int64)
	}{
		{"inodes for a restore", state.leaveInodes},
		{"space for a restore", state.leave},
	} {
		s.sweep(r.what, func(n int64) error {
			before := state.paths()
			r.give(n)
			run, err := s.engine.Restore(s.ctx, c, dir)
			state.remount(roomy)
			what := fmt.Sprintf("%s, %d: %v", r.what, n, err)
			if err != nil {
				s.checkSaysWhatToDo(what, err, "free", "remove files")
			} else {
				s.waitNumbers(run.Output, workload.Ticks, 3)
				// The counter has changed its files: the next restore is from
				// another set.
				dir = s.newDir()
				s.check(s.engine.CheckpointTo(s.ctx, run, dir, true))
				s.waitExit(run, 137)
			}
			s.checkNothingRuns()
			state.checkHas(what, before)
			return err
		})
	}
	s.check(verify(dir, s.newDir()))
	s.remove(c)
}

// checkSaysWhatToDo checks that an error has one of the words.
func (s *scenario) checkSaysWhatToDo(what string, err error, words ...string) {
	s.Helper()
	if !slices.ContainsFunc(words, func(word string) bool { return strings.Contains(err.Error(), word) }) {
		s.Errorf("%s: the error does not say what to do", what)
	}
}

// fewDescriptors: the shim or the agent can open no more files at whatever step of
// a checkpoint. The container keeps running, and nothing is left.
func fewDescriptors(s *scenario) {
	k := &killer{scenario: s, c: s.create(counter("c"))}
	k.run = s.run(k.c)
	s.waitNumbers(k.run.Output, workload.Ticks, 3)
	dir := filepath.Join(s.newDir(), "set")
	s.check(os.Mkdir(dir, 0o700))
	s.check(s.requestCheckpoint(k.run, dir))
	shim := k.pid("shim")

	ofShim := func(n int64) func() {
		open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", shim))
		s.check(err)
		var before unix.Rlimit
		s.check(unix.Prlimit(shim, unix.RLIMIT_NOFILE, nil, &before))
		s.check(unix.Prlimit(shim, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(int64(len(open)) + n), Max: before.Max}, nil))
		return func() { s.check(unix.Prlimit(shim, unix.RLIMIT_NOFILE, &before, nil)) }
	}
	limit := func(n string) {
		s.shellInGuestOf(k.c.ID(), findAgent+`for p in /proc/[0-9]*; do case "$(readlink $p/exe)" in */workload) break;; esac; done
set -- /proc/$agent/fd/*; $p/exe limit --pid $agent --files `+n)
	}
	ofAgent := func(n int64) func() {
		limit(fmt.Sprintf("$(($# + %d))", n))
		return func() { limit("1024") }
	}
	for what, limit := range map[string]func(n int64) func(){"descriptors of the shim": ofShim, "descriptors of the agent": ofAgent} {
		s.sweep(what, func(n int64) error {
			undo := limit(n)
			err := s.requestCheckpoint(k.run, dir)
			undo()
			s.check(verify(dir, s.newDir()))
			s.checkKeepsRunning(k.run)
			s.checkNothingBeside(dir)
			return err
		})
	}
}

// checkNothingBeside checks that there is nothing but an image set in a directory,
// and nothing in an exchange directory.
func (s *scenario) checkNothingBeside(set string) {
	s.Helper()
	var left []string
	if !s.eventually(settleTimeout, func() bool {
		entries, err := os.ReadDir(filepath.Dir(set))
		s.check(err)
		exchanged, err := s.testbed.Exchanged("[^.]*")
		s.check(err)
		left = exchanged
		for _, e := range entries {
			if e.Name() != filepath.Base(set) {
				left = append(left, e.Name())
			}
		}
		return len(left) == 0
	}) {
		s.Errorf("there is left %q", left)
	}
}

// outOfMemory: a CRIU for which there is no memory is what the guest's kernel
// kills, and neither the agent nor the container. One that has none in a restore
// leaves nothing. A shim that the host kills for its memory takes its container
// with it, and leaves an earlier image set whole.
func outOfMemory(s *scenario) {
	args := []string{workload.Path, "memory", "--mib", "64", "--shm-mib", "1"}
	k := &killer{scenario: s, c: s.create(engine.Container{ID: "c", Args: args})}
	k.run = s.run(k.c)
	s.waitNumbers(k.run.Output, workload.Rounds, 2)
	k.targets = s.newDir()
	k.whole = filepath.Join(k.targets, "whole")
	s.check(os.Mkdir(k.whole, 0o700))
	s.check(s.requestCheckpoint(k.run, k.whole))

	// The guest's kernel chooses what to kill, as it does when it is out of memory.
	t := trial{point{operation: "checkpoint", phase: "inspect", guest: true, midway: true}, "criu"}
	k.arm(t)
	answer := make(chan error, 1)
	go func() { answer <- k.engine.CheckpointTo(s.ctx, k.run, k.whole, false) }()
	k.reach(t, answer)
	s.shellInGuestOf(k.c.ID(), afterAnswer("echo f >/proc/sysrq-trigger"))
	err := k.waitAnswer(t, answer)
	if killed := s.shellInGuestOf(k.c.ID(), "grep -w oom_kill /proc/vmstat"); killed == "oom_kill 0" {
		s.Fatalf("nothing was killed for its memory; the checkpoint ended with: %v", err)
	}
	k.checkSurvives(t, err)
	s.check(k.requestCheckpoint(k.run, k.whole))
	s.step("CRIU in the guest: %v", err)

	// A container that may use less than what was checkpointed. It is one of a pod:
	// a VM that is a single container's would have no more memory either.
	s.check(k.engine.EndTask(s.ctx, k.c))
	k.run = nil
	pod := s.startPod()
	small := pod.create(engine.Container{ID: "small", Args: args, Spec: []oci.SpecOpts{oci.WithMemoryLimit(24 << 20), oci.WithMemorySwap(24 << 20)}})
	if _, err = s.engine.Restore(s.ctx, small, k.whole); err == nil {
		s.Error("64 MiB were restored into 24 MiB")
	} else {
		s.checkSaysWhatToDo("a restore into 24 MiB", err, "higher memory limit")
	}
	s.remove(small)
	s.remove(pod.sandbox)
	s.checkNothingRuns()
	s.step("a restore: %v", err)
	k.run = s.restore(k.c, k.whole)
	s.waitNumbers(k.run.Output, workload.Rounds, 2)

	// The shim.
	ours := k.sockets()
	release := s.limitMemory(k.pid("shim"))
	err = s.requestCheckpoint(k.run, k.whole)
	s.step("the shim: %v", err)
	if err == nil {
		s.Error("the shim made a checkpoint without memory")
	}
	k.checkTaskEnds(trial{victim: "shim"}, ours)
	release()
	k.checkWholeOrNothing(t, k.whole, true)
	restored := s.restore(k.c, k.whole)
	s.waitNumbers(restored.Output, workload.Rounds, 2)
}

// limitMemory lets a process of the host have no more memory than it has, or
// hardly: more is counted in a cgroup of its own. It returns what removes that.
func (s *scenario) limitMemory(pid int) (remove func()) {
	s.Helper()
	dir, limit := "/sys/fs/cgroup/memory", "memory.limit_in_bytes"
	if _, err := os.Stat(filepath.Join(dir, limit)); err != nil {
		dir, limit = "/sys/fs/cgroup", "memory.max"
	}
	dir = filepath.Join(dir, "kata-checkpoint-"+runTag)
	s.check(os.Mkdir(dir, 0o755))
	s.Cleanup(func() {
		if err := os.Remove(dir); err != nil && !os.IsNotExist(err) {
			s.Error(err)
		}
	})
	s.check(os.WriteFile(filepath.Join(dir, limit), []byte("262144"), 0))
	s.check(os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0))
	return func() {
		s.Helper()
		if !s.eventually(settleTimeout, func() bool { return os.Remove(dir) == nil }) {
			s.Errorf("%s cannot be removed", dir)
		}
	}
}

// clockSteps: the guest's clock is set, forwards and backwards, at whatever moment
// of a checkpoint or a restore, and is another one where it is restored.
func clockSteps(s *scenario) {
	k := &killer{scenario: s, targets: s.newDir(), c: s.create(engine.Container{ID: "c", Args: []string{workload.Path, "memory", "--mib", "16", "--shm-mib", "1"}})}
	k.run = s.run(k.c)
	s.waitNumbers(k.run.Output, workload.Rounds, 3)
	const day = 24 * 60 * 60
	step := func(days int) {
		s.Helper()
		s.shellInGuestOf(k.c.ID(), fmt.Sprintf("date -s @$(($(date +%%s) + %d))", days*day))
	}
	for _, days := range []int{3, -9, 10000, -12000} {
		step(days)
		s.check(s.requestCheckpoint(k.run, s.newDir()))
		s.checkKeepsRunning(k.run)
	}
	s.step("between checkpoints")

	midway := point{operation: "checkpoint", phase: "inspect", guest: true}
	frozen := point{operation: "checkpoint", phase: "freeze"}
	for _, p := range []point{midway, frozen} {
		for _, days := range []int{400, -400} {
			dir := s.newDir()
			t := trial{point: p}
			k.arm(t)
			answer := make(chan error, 1)
			go func() { answer <- k.requestCheckpoint(k.run, dir) }()
			k.reach(t, answer)
			step(days)
			k.proceed(t)
			s.check(k.waitAnswer(t, answer))
			s.check(verify(dir, s.newDir()))
			s.checkKeepsRunning(k.run)
		}
	}
	s.step("during checkpoints")

	dir := s.checkpoint(k.run, true)
	s.waitExit(k.run, 137)
	before := s.printedNumbers(k.run.Output, workload.Rounds)
	for _, p := range []point{
		{operation: "restore", phase: "adopt"},
		{operation: "restore", phase: "restore-devshm", guest: true},
		{operation: "restore", phase: "criu-restore", guest: true},
	} {
		for _, days := range []int{400, -400} {
			t := trial{point: p}
			k.arm(t)
			answer := make(chan error, 1)
			var restored *engine.Run
			go func() {
				var err error
				restored, err = s.engine.Restore(s.ctx, k.c, dir)
				answer <- err
			}()
			k.reach(t, answer)
			step(days)
			k.proceed(t)
			s.check(k.waitAnswer(t, answer))
			s.checkContinuesAfter(restored, before[len(before)-1])
			if out := s.shell(restored, "echo it answers"); !slices.Equal(out, []string{"it answers"}) {
				s.Errorf("an exec printed %q", out)
			}
			s.check(s.requestCheckpoint(restored, s.newDir()))
			s.check(s.engine.EndTask(s.ctx, k.c))
		}
	}
	s.step("during restores")
}

// proceed has an operation continue, wherever it has stopped.
func (k *killer) proceed(t trial) {
	k.Helper()
	if t.guest {
		k.shellInGuestOf(k.c.ID(), "rm "+guestStops+"/*.reached")
		return
	}
	k.release(t)
}

// callsDuringRestore: during a restore an exec is refused and the state answered at
// once, and SIGKILL ends it, with all that waits for it.
func callsDuringRestore(s *scenario) {
	k := &killer{scenario: s, c: s.create(counter("c"))}
	k.run = s.run(k.c)
	s.waitNumbers(k.run.Output, workload.Ticks, 3)
	dir := s.checkpoint(k.run, true)
	s.waitExit(k.run, 137)
	midway := trial{point: point{operation: "restore", phase: "restore-devshm", guest: true, midway: true}}
	for _, t := range []trial{
		{point: point{operation: "restore", phase: "start"}},
		{point: point{operation: "restore", phase: "restore-devshm", guest: true}},
		midway,
	} {
		k.arm(t)
		answer := make(chan error, 1)
		go func() {
			_, err := s.engine.Restore(s.ctx, k.c, dir)
			answer <- err
		}()
		k.reach(t, answer)
		task, err := k.c.Task(s.ctx, nil)
		s.check(err)
		run := &engine.Run{Task: task}
		s.checkPrompt("an exec during a restore", func() {
			_, err := s.engine.Exec(s.ctx, run, engine.Command{ID: "early", Args: []string{"true"}})
			if err == nil || !strings.Contains(err.Error(), "is being restored") {
				s.Errorf("%s: an exec during a restore: %v", t, err)
			}
		})
		// These may wait for its end.
		waiting := make(chan error, 3)
		for _, call := range []func() error{
			func() error { return task.Pause(s.ctx) },
			func() error { return s.requestCheckpoint(run, s.newDir()) },
			func() error { _, err := task.Delete(s.ctx); return err },
		} {
			go func() { waiting <- call() }()
		}
		s.checkPrompt("state during a restore", func() {
			if status, err := task.Status(s.ctx); err != nil || status.Status != client.Created {
				s.Errorf("%s: the state is %q, %v", t, status.Status, err)
			}
		})
		s.checkPrompt("SIGKILL during a restore", func() {
			s.check(task.Kill(s.ctx, syscall.SIGKILL))
			err = k.waitAnswer(t, answer)
		})
		if err == nil {
			s.Errorf("%s: restored", t)
		}
		for range cap(waiting) {
			if err := k.waitAnswer(t, waiting); err == nil {
				s.Errorf("%s: what was asked for during the restore was done", t)
			}
		}
		k.run = nil
		k.checkTaskEnds(t, nil)
		s.step("%s: %v", t, err)
	}
	restored := s.restore(k.c, dir)
	s.waitNumbers(restored.Output, workload.Ticks, 3)
}
