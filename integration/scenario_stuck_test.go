// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/client"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// stuckParts: whatever part is stopped during a checkpoint, the checkpoint ends at
// its deadline. Once the part continues, the container does as well, though nobody
// asks for it, and the next checkpoint is made.
func stuckParts(s *scenario) {
	limit := paced(8 * time.Second).Round(time.Second)
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
	k.step("%s: %v", t, err)
}

// stop stops a part, releases the operation, and returns what continues the part.
func (k *killer) stop(t trial) (proceed func()) {
	k.Helper()
	inGuest := func(find, victim string) func() {
		k.shellInGuestOf(k.c.ID(), find+"kill -STOP $"+victim)
		return func() { k.shellInGuestOf(k.c.ID(), find+"kill -CONT $"+victim) }
	}
	switch t.victim {
	case "criu":
		// The agent has ended it by then, with the checkpoint.
		return func() {}
	case "agent":
		proceed = inGuest(findAgent, "agent")
	default:
		var pids []int
		if t.victim == "virtiofsd" {
			var err error
			pids, err = k.testbed.Pids(func(args []string) bool {
				return strings.HasSuffix(filepath.Base(args[0]), "virtiofsd") && strings.Contains(strings.Join(args, " "), k.c.ID())
			})
			k.check(err)
			if len(pids) == 0 {
				k.Fatal("there is no virtiofsd")
			}
		} else {
			pids = []int{k.pid(t.victim)}
		}
		signal := func(sig syscall.Signal) {
			for _, pid := range pids {
				k.check(syscall.Kill(pid, sig))
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
