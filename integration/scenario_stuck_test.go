// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/errdefs"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/testbed"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
	"github.com/kata-checkpoint/kata-checkpoint/internal/procfs"
)

// kataPatience is how long a VM can be stopped until Kata's Go shim, which waits
// so long for its agent's answer, ends it (src/runtime/virtcontainers/kata_agent.go).
const kataPatience = 30 * time.Second

// stuckParts: whatever part is stopped during a checkpoint, the checkpoint ends at
// its deadline. Once the part continues, the container does as well, though nobody
// asks for it, and the next checkpoint is made.
func stuckParts(s *scenario) {
	limit := paced(8 * time.Second).Round(time.Second)
	if s.testbed.Way == testbed.Go {
		limit = min(limit, kataPatience-5*time.Second)
	}
	s.configure("checkpoint_timeout", limit.String())
	s.configure("freeze_timeout", "2s")
	k := &killer{scenario: s, c: s.create(engine.Container{ID: "c", Args: []string{workload.Path, "memory", "--mib", "32", "--shm-mib", "1", "--every", "500ms"}})}
	k.run = s.run(k.c)
	s.waitNumbers(k.run.Output, workload.Rounds, 1)
	midway := point{operation: "checkpoint", phase: "inspect", guest: true, midway: true}
	frozen := point{operation: "checkpoint", phase: "freeze"}
	for _, t := range []trial{
		{midway, "criu"}, // which was stopped when it was reached
		{midway, "agent"},
		{frozen, "agent"},
		{frozen, "virtiofsd"},
		{frozen, "vm"},
		{frozen, "kata"},
	} {
		k.stuck(t, limit)
	}
	for _, victim := range []string{"shim", "containerd"} {
		k.stuckCaller(trial{frozen, victim}, limit)
	}
}

// stuck stops a part during a checkpoint, and continues it when the checkpoint has
// ended.
func (k *killer) stuck(t trial, limit time.Duration) {
	k.Helper()
	dir := k.newDir()
	k.arm(t)
	answer := make(chan error, 1)
	begin := time.Now()
	go func() { answer <- k.requestCheckpoint(k.run, dir) }()
	k.reach(t, answer)
	proceed := k.stop(t)
	err := k.waitAnswer(t, answer)
	if took, most := time.Since(begin), limit+paced(answerTimeout); took > most {
		k.Errorf("%s: the checkpoint ended after %s", t, took)
	}
	switch {
	case err != nil:
		k.checkEmpty(dir)
		if !strings.Contains(err.Error(), "checkpoint_timeout of "+limit.String()+" has expired") {
			k.Errorf("%s: the checkpoint ended with: %v", t, err)
		}
	case t.victim != "kata": // which a checkpoint that stops nothing does without
		k.Errorf("%s: the checkpoint was made", t)
	}
	proceed()
	k.checkContinues(t, dir)
	k.step("%s: %v", t, err)
}

// stuckCaller is [killer.stuck] for what is between the engine and the container:
// the engine's own deadline ends its wait.
func (k *killer) stuckCaller(t trial, limit time.Duration) {
	k.Helper()
	dir := k.newDir()
	k.arm(t)
	ctx, cancel := context.WithTimeout(k.ctx, limit)
	defer cancel()
	answer := make(chan error, 1)
	go func() { answer <- k.requestCheckpointWithin(ctx, k.run, dir) }()
	k.reach(t, answer)
	proceed := k.stop(t)
	err := k.waitAnswer(t, answer)
	// Of whatever class, if it was containerd that noticed first.
	if err == nil || !errdefs.IsDeadlineExceeded(err) && !strings.Contains(err.Error(), context.DeadlineExceeded.Error()) {
		k.Errorf("%s: the checkpoint ended with: %v", t, err)
	}
	proceed()
	k.checkContinues(t, dir)
	k.step("%s: %v", t, err)
}

// checkContinues checks that the container runs, though nobody has asked for it,
// and that the next checkpoint is made.
func (k *killer) checkContinues(t trial, dir string) {
	k.Helper()
	var status client.Status
	if !k.eventually(answerTimeout, func() bool {
		var err error
		status, err = k.run.Status(k.ctx)
		return err == nil && status.Status == client.Running
	}) {
		k.Fatalf("%s: the task is %q", t, status.Status)
	}
	k.checkKeepsRunning(k.run)
	k.check(k.requestCheckpoint(k.run, dir))
	k.check(verify(dir, k.newDir()))
	k.checkKeepsRunning(k.run)
}

// stop stops a part, releases the operation, and returns what continues the part.
func (k *killer) stop(t trial) (proceed func()) {
	k.Helper()
	inGuest := func(find, victim string) func() {
		k.shellInGuestOf(k.c.ID(), find+"kill -STOP $"+victim)
		vm := k.pid("vm")
		started, err := procfs.StartTime(vm)
		k.check(err)
		return func() {
			ctx, cancel := context.WithTimeout(k.ctx, paced(answerTimeout))
			defer cancel()
			_, status, err := k.testbed.GuestExec(ctx, k.c.ID(), find+"kill -CONT $"+victim)
			// After a SIGKILL of its only container, a VM may have ended.
			if (err != nil || status != 0) && !k.eventually(settleTimeout, func() bool { return !procfs.Is(vm, started) }) {
				k.Fatalf("%s: in the guest: status %d: %v", t, status, err)
			}
		}
	}
	switch t.victim {
	case "criu":
		// The agent has ended it by then, with the checkpoint.
		return func() {}
	case "agent":
		proceed = inGuest(findAgent, "agent")
	default:
		var pids []int
		switch t.victim {
		case "virtiofsd":
			pids = k.virtiofsd()
		case "containerd":
			pids = []int{k.testbed.Containerd.PID}
		default:
			pids = []int{k.pid(t.victim)}
		}
		signal := func(sig syscall.Signal) {
			for _, pid := range pids {
				if err := syscall.Kill(pid, sig); sig == syscall.SIGSTOP || t.victim != "vm" || !errors.Is(err, syscall.ESRCH) {
					k.check(err)
				}
			}
		}
		signal(syscall.SIGSTOP)
		proceed = func() { signal(syscall.SIGCONT) }
	}
	if !t.guest {
		k.release(t)
	}
	return proceed
}

// stuckRestores: whatever part is stopped during a restore, the container's calls
// are answered meanwhile, and the restore ends at its deadline, or when the
// container is killed. Once the part continues, nothing is left of it, and the next
// restore works.
func stuckRestores(s *scenario) {
	limit := paced(15 * time.Second).Round(time.Second)
	k := &killer{scenario: s, c: s.create(engine.Container{ID: "c", Args: []string{workload.Path, "memory", "--mib", "32", "--shm-mib", "1", "--every", "500ms"}})}
	k.ensureRunning()
	k.whole = s.checkpoint(k.run, true)
	s.waitExit(k.run, 137)
	k.run = nil
	s.configure("checkpoint_timeout", limit.String())
	adopted := point{operation: "restore", phase: "adopt"}
	started := point{operation: "restore", phase: "start"}
	devshm := point{operation: "restore", phase: "restore-devshm", guest: true}
	midway := devshm
	midway.midway = true
	for _, t := range []trial{
		{adopted, "kata"}, // which starts the placeholder once it continues
		{started, "shim"},
		{started, "containerd"},
	} {
		k.stuckRestoreCaller(t, limit)
	}
	for _, t := range []trial{
		{adopted, "kata"},
		{midway, "criu"}, // which was stopped when it was reached
		{midway, "agent"},
		{started, "virtiofsd"},
		{point{operation: "restore", phase: "criu-restore", guest: true}, "vm"},
	} {
		k.stuckRestore(t, limit, false)
	}
	for _, t := range []trial{{adopted, "kata"}, {devshm, "agent"}, {midway, "agent"}, {started, "virtiofsd"}} {
		k.stuckRestore(t, limit, true)
	}
	k.run = s.restore(k.c, k.whole)
	s.waitNumbers(k.run.Output, workload.Rounds, 2)
}

// beginRestore begins a restore and returns when it has come to the trial's point,
// with the task and where Start's answer will come.
func (k *killer) beginRestore(ctx context.Context, t trial) (*engine.Run, <-chan error) {
	k.Helper()
	k.arm(t)
	run, err := k.engine.PrepareRestore(ctx, k.c, k.whole)
	k.check(err)
	k.checkStatus(run, client.Created)
	answer := make(chan error, 1)
	go func() { answer <- run.Start(ctx) }()
	k.reach(t, answer)
	return run, answer
}

// stuckRestore stops a part during a restore, which then is to end at its deadline
// or by a SIGKILL, and continues the part.
func (k *killer) stuckRestore(t trial, limit time.Duration, killed bool) {
	k.Helper()
	run, answer := k.beginRestore(k.ctx, t)
	begin := time.Now()
	ours := k.sockets()
	proceed := k.stop(t)
	k.checkPrompt("an exec", func() {
		_, err := k.engine.Exec(k.ctx, run, engine.Command{ID: "early", Args: []string{"true"}})
		if err == nil || !strings.Contains(err.Error(), "is being restored") {
			k.Errorf("%s: an exec: %v", t, err)
		}
	})
	k.checkPrompt("state", func() { k.checkStatus(run, client.Created) })
	paused := make(chan error, 1) // which may wait for the restore's end
	go func() { paused <- run.Pause(k.ctx) }()
	end, want := limit, "checkpoint_timeout of "+limit.String()+" has expired"
	kill := make(chan error, 1)
	if killed {
		begin, end, want = time.Now(), 0, "was killed"
		go func() { kill <- run.Kill(k.ctx, syscall.SIGKILL, client.WithKillAll) }()
	} else {
		kill <- nil
	}
	err := k.waitAnswer(t, answer)
	// Processes that wait for virtiofsd or for a CRIU that is stopped cannot end.
	kerr := k.waitAnswer(t, kill)
	if kerr != nil && t.victim == "agent" && !t.midway {
		k.Errorf("%s: SIGKILL: %v", t, kerr)
	}
	// What Kata does not do in time has a limit of its own, for the restore and for
	// the SIGKILL.
	if took, most := time.Since(begin), end+20*time.Second+paced(2*time.Second); took > most {
		k.Errorf("%s: the restore ended after %s", t, took)
	}
	// On a slow machine, Kata may end a VM before the deadline ends the restore.
	ended := t.victim == "vm" && k.testbed.Way == testbed.Go && limit > kataPatience && err != nil && strings.Contains(err.Error(), "the agent in the guest is gone")
	if !ended && (err == nil || !strings.Contains(err.Error(), want)) {
		k.Errorf("%s: the restore ended with: %v", t, err)
	}
	if err := k.waitAnswer(t, paused); err == nil {
		k.Errorf("%s: it was paused", t)
	}
	proceed()
	k.run = run
	k.endStuck(t, ours)
	if lines := run.Output.Lines(); len(lines) > 0 {
		k.Errorf("%s: what was not restored has printed %q", t, lines)
	}
	k.step("%s, killed %t: %v; %v", t, killed, err, kerr)
}

// stuckRestoreCaller is [killer.stuckRestore] with an engine that ends its wait
// itself, before the restore ends.
func (k *killer) stuckRestoreCaller(t trial, limit time.Duration) {
	k.Helper()
	ctx, cancel := context.WithTimeout(k.ctx, paced(time.Minute))
	defer cancel()
	run, answer := k.beginRestore(ctx, t)
	ours := k.sockets()
	proceed := k.stop(t)
	if poll(k.ctx, limit/3, func() bool { return len(answer) > 0 }) {
		k.Errorf("%s: Start was answered", t)
	}
	cancel()
	err := k.waitAnswer(t, answer) // and the engine has removed the FIFOs
	if err == nil {
		k.Errorf("%s: restored", t)
	}
	proceed()
	k.run = run
	k.endStuck(t, ours)
	k.step("%s: %v", t, err)
}

// endStuck ends the task of a restore that has failed, as an engine does, and
// checks that nothing is left.
func (k *killer) endStuck(t trial, sockets []string) {
	k.Helper()
	if err := k.run.Kill(k.ctx, syscall.SIGKILL, client.WithKillAll); err != nil && !errdefs.IsNotFound(err) && !errdefs.IsFailedPrecondition(err) {
		k.Errorf("%s: SIGKILL afterwards: %v", t, err)
	}
	k.checkTaskEnds(t, sockets)
}

// lostVirtiofsd: virtiofsd dies, and with it all files of the guest. A checkpoint
// or a restore in progress ends, long before its deadline; an earlier image set
// stays whole; the task can be ended and leaves nothing.
func lostVirtiofsd(s *scenario) {
	k := &killer{scenario: s, targets: s.newDir(), c: s.create(engine.Container{ID: "c", Args: []string{workload.Path, "memory", "--mib", "32", "--shm-mib", "1", "--every", "500ms"}})}
	k.whole = filepath.Join(k.targets, "whole")
	s.check(os.Mkdir(k.whole, 0o700))
	for _, t := range []trial{
		{point{operation: "checkpoint", phase: "freeze"}, "virtiofsd"},
		{point{operation: "checkpoint", phase: "inspect", guest: true, midway: true}, "virtiofsd"},
		{point{operation: "checkpoint", phase: "copy-images"}, "virtiofsd"},
		{point{operation: "restore", phase: "start"}, "virtiofsd"},
		{point{operation: "restore", phase: "restore-devshm", guest: true, midway: true}, "virtiofsd"},
	} {
		if t.operation == "checkpoint" {
			k.ensureRunning()
			if entries, err := os.ReadDir(k.whole); err == nil && len(entries) == 0 {
				s.check(k.requestCheckpoint(k.run, k.whole))
			}
		}
		k.arm(t)
		answer := make(chan error, 1)
		go func() {
			if t.operation == "checkpoint" {
				answer <- k.requestCheckpoint(k.run, k.whole)
				return
			}
			_, err := k.engine.Restore(k.ctx, k.c, k.whole)
			answer <- err
		}()
		k.reach(t, answer)
		ours := k.sockets()
		for _, pid := range k.virtiofsd() {
			k.check(syscall.Kill(pid, syscall.SIGKILL))
		}
		switch {
		case t.midway:
			// Where the VM has not ended meanwhile.
			ctx, cancel := context.WithTimeout(s.ctx, paced(2*time.Second))
			_, _, _ = s.testbed.GuestExec(ctx, k.c.ID(), findAgent+findCRIU+"kill -CONT $criu")
			cancel()
		case !t.guest:
			k.release(t)
		}
		err := k.waitAnswer(t, answer)
		switch {
		case t.phase == "copy-images": // which no longer needs it
		case err == nil:
			k.Errorf("%s: it worked", t)
		case s.testbed.Way == testbed.Rust && !strings.Contains(err.Error(), "virtiofsd has exited"):
			// With Kata's Go shim the VM ends, too.
			k.Errorf("%s: it ended with: %v", t, err)
		}
		k.step("%s: %v", t, err)
		if k.run != nil {
			s.checkPrompt("SIGKILL", func() { _ = k.run.Kill(s.ctx, syscall.SIGKILL, client.WithKillAll) })
		}
		k.checkTaskEnds(t, ours)
		k.checkWholeOrNothing(t, k.whole, true)
	}
	k.run = s.restore(k.c, k.whole)
	s.waitNumbers(k.run.Output, workload.Rounds, 2)
}

// virtiofsd finds the processes of the container's virtiofsd.
func (k *killer) virtiofsd() []int {
	k.Helper()
	pids, err := k.testbed.Pids(func(args []string) bool {
		return strings.HasSuffix(filepath.Base(args[0]), "virtiofsd") && strings.Contains(strings.Join(args, " "), k.c.ID())
	})
	k.check(err)
	if len(pids) == 0 {
		k.Fatal("there is no virtiofsd")
	}
	return pids
}
