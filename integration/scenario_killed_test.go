// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/errdefs"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/testbed"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
	"github.com/kata-checkpoint/kata-checkpoint/internal/stopat"
)

// killedEnv chooses what is killed where: `all`, or a part of a trial's name,
// such as agent, restore or "checkpoint-freeze vm". Without it each way of Kata
// gets a half of all, and the core set has each victim once or twice.
const killedEnv = "TESTBED_KILLED"

// victims, the ones first with which the container lives on.
var victims = []string{"criu", "agent", "shim", "kata", "vm"}

// point is where something is killed: at the end of a phase, or while CRIU is
// in the middle of its work.
type point struct {
	operation string // checkpoint or restore
	phase     string // as its stop is called, without the operation
	guest     bool   // the phase is the agent's
	midway    bool   // what follows the phase is CRIU's work, which is to be in progress
	victims   string
	core      string // the victim in the core set
}

var points = []point{
	{operation: "checkpoint", phase: "prepare", victims: "agent shim kata vm"},
	{operation: "checkpoint", phase: "freeze", victims: "agent shim kata vm", core: "kata"},
	{operation: "checkpoint", phase: "inspect", guest: true, victims: "agent shim kata vm", core: "agent"},
	{operation: "checkpoint", phase: "inspect", guest: true, midway: true, victims: "criu agent shim kata vm", core: "criu"},
	{operation: "checkpoint", phase: "thaw", guest: true, victims: "agent shim kata vm"},
	{operation: "checkpoint", phase: "copy-logs", guest: true, victims: "agent shim kata vm"},
	{operation: "checkpoint", phase: "copy-images", victims: "agent shim kata vm", core: "shim"},
	{operation: "checkpoint", phase: "commit", victims: "agent shim kata vm", core: "vm"},
	{operation: "restore", phase: "stage-images", victims: "shim kata"},
	// An agent that dies before the shim has met it is one that never was:
	// refused-without-agent.
	{operation: "restore", phase: "create", victims: "shim kata vm"},
	{operation: "restore", phase: "adopt", victims: "agent shim kata vm"},
	{operation: "restore", phase: "start", victims: "agent shim kata vm", core: "shim"},
	{operation: "restore", phase: "restore-devshm", guest: true, victims: "agent shim kata vm"},
	{operation: "restore", phase: "restore-devshm", guest: true, midway: true, victims: "criu agent shim kata vm", core: "agent"},
	{operation: "restore", phase: "mount-the-exec-helper", guest: true, victims: "agent shim kata vm"},
	{operation: "restore", phase: "criu-restore", guest: true, victims: "agent shim kata vm"},
	{operation: "restore", phase: "restored", victims: "agent shim kata vm", core: "vm"},
}

// trial is one kill.
type trial struct {
	point
	victim string
}

func (t trial) String() string {
	phase := t.operation + "-" + t.phase
	if t.midway {
		phase = t.operation + "-midway"
	}
	return phase + " " + t.victim
}

// containerSurvives reports whether the container must outlive the victim.
func (t trial) containerSurvives() bool { return t.victim == "agent" || t.victim == "criu" }

// trials lists what is killed during an operation on one way of Kata: what was
// chosen with [killedEnv], else the core set or one half of all.
func trials(operation string, way testbed.Way, chosen string, core bool) []trial {
	var out []trial
	n := 0
	for _, v := range victims {
		for _, p := range points {
			t := trial{p, v}
			if !strings.Contains(p.victims, v) {
				continue
			}
			n++
			mine := v == "criu" || (n%2 == 0) == (way == testbed.Go)
			switch {
			case chosen == "all":
				mine = true
			case chosen != "":
				mine = strings.Contains(t.String(), chosen)
			case core:
				mine = v == p.core
			}
			if mine && p.operation == operation {
				out = append(out, t)
			}
		}
	}
	return out
}

func TestTrials(t *testing.T) {
	names := func(way testbed.Way, chosen string, core bool) (out []string) {
		for _, operation := range []string{"checkpoint", "restore"} {
			for _, t := range trials(operation, way, chosen, core) {
				out = append(out, t.String())
			}
		}
		return out
	}
	all := names(testbed.Go, "all", false)
	halves := append(names(testbed.Go, "", false), names(testbed.Rust, "", false)...)
	for _, trial := range all {
		if !slices.Contains(halves, trial) {
			t.Errorf("%s is in neither half", trial)
		}
	}
	core := names(testbed.Go, "", true)
	for _, victim := range victims {
		if !slices.ContainsFunc(core, func(trial string) bool { return strings.HasSuffix(trial, " "+victim) }) {
			t.Errorf("the core set does not kill %s: %q", victim, core)
		}
	}
	if len(core) > len(all)/4 {
		t.Errorf("the core set has %d trials of %d", len(core), len(all))
	}
	if have := names(testbed.Rust, "freeze vm", true); !slices.Equal(have, []string{"checkpoint-freeze vm"}) {
		t.Errorf("chosen are %q", have)
	}
}

// TestPointsExist checks that operations pass all points: at another one a
// scenario would wait in vain.
func TestPointsExist(t *testing.T) {
	passed := make(map[string]bool)
	for _, pattern := range []string{"../guestagent/internal/agent/*.go", "../plugin/internal/task/*.go"} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			source, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range regexp.MustCompile(`\.(?:done|Wait)\((?:ctx, )?(?:"(restore)", )?"([^"]+)"`).FindAllStringSubmatch(string(source), -1) {
				operations := []string{"checkpoint", "restore"}
				if m[1] != "" {
					operations = m[1:2]
				}
				for _, operation := range operations {
					passed[stopat.FileName(operation, m[2])] = true
				}
			}
		}
	}
	for _, p := range points {
		if name := p.operation + "-" + p.phase; !passed[name] {
			t.Errorf("no operation passes %s", name)
		}
	}
}

// killer is the scenario's state.
type killer struct {
	*scenario
	c       client.Container
	run     *engine.Run // nil: it does not run
	whole   string      // a directory with an earlier image set
	targets string      // a directory for more
}

// killed: whatever is killed at whatever moment of a checkpoint or a restore,
// nothing is left frozen, half done or without an owner, and the next one
// works. The workload has a TCP connection that is in use all the time, and one
// that each of its rounds needs.
func killed(s *scenario) {
	k := &killer{scenario: s, targets: s.newDir(), c: s.create(engine.Container{ID: "c", Args: []string{workload.Path, "memory", "--mib", "32", "--shm-mib", "1", "--loopback"}})}
	k.ensureRunning()
	k.whole = filepath.Join(k.targets, "whole")
	s.check(os.Mkdir(k.whole, 0o700))
	s.check(s.requestCheckpoint(k.run, k.whole))

	for i, t := range trials("checkpoint", s.testbed.Way, os.Getenv(killedEnv), core) {
		k.checkpoint(i, t)
	}
	if k.run != nil {
		k.endTask()
	}
	for _, t := range trials("restore", s.testbed.Way, os.Getenv(killedEnv), core) {
		k.restore(t)
	}
	restored := s.restore(k.c, k.whole)
	s.waitNumbers(restored.Output, workload.Rounds, 2)
	s.step("what was checkpointed before all that is restored")
}

// ensureRunning makes sure that the container runs.
func (k *killer) ensureRunning() {
	k.Helper()
	if k.run == nil {
		k.run = k.scenario.run(k.c)
		k.waitNumbers(k.run.Output, workload.Rounds, 1)
	}
}

// checkpoint is one with a kill in between.
func (k *killer) checkpoint(i int, t trial) {
	k.ensureRunning()
	dir := k.whole
	if i%2 == 1 {
		dir = filepath.Join(k.targets, fmt.Sprint(i))
		k.check(os.Mkdir(dir, 0o700))
	}
	ours := k.sockets()
	k.arm(t)
	answer := make(chan error, 1)
	go func() {
		if t.phase == "copy-images" || t.midway {
			answer <- k.engine.CheckpointTo(k.ctx, k.run, dir, false) // with a pause of its own
			return
		}
		answer <- k.requestCheckpoint(k.run, dir)
	}()
	k.reach(t, answer)
	k.kill(t)
	err := k.waitAnswer(t, answer)
	if t.containerSurvives() {
		k.checkSurvives(t, err)
	} else {
		k.checkTaskEnds(t, ours)
	}
	k.checkWholeOrNothing(t, dir, err == nil || dir == k.whole)
	k.step("%s: %v", t, err)
}

// checkSurvives checks a container of which only a helper was killed.
func (k *killer) checkSurvives(t trial, err error) {
	if err != nil && !strings.Contains(strings.ToLower(err.Error()), t.victim) {
		k.Errorf("%s: the error does not name it: %v", t, err)
	}
	if t.victim == "criu" {
		if err == nil {
			k.Fatalf("%s: the checkpoint was made without it", t)
		}
		k.checkNamesLog(err)
	}
	if t.victim == "agent" { // the thaw that it owed is tried until another one does it
		k.eventually(settleTimeout, func() bool {
			status, err := k.run.Status(k.ctx)
			return err == nil && status.Status == client.Running
		})
	}
	k.checkKeepsRunning(k.run)
	if t.midway { // elsewhere the next trial sees to it
		if err := k.requestCheckpoint(k.run, k.whole); err != nil {
			k.Errorf("%s: the next checkpoint: %v", t, err)
		}
		k.checkKeepsRunning(k.run)
	}
	// An agent that is started again has a container of its own for a while.
	var left []string
	if !k.eventually(settleTimeout, func() bool {
		var err error
		left, err = filepath.Glob(filepath.Join(k.testbed.Dir, "state/*/*/[^.]*"))
		k.check(err)
		return len(left) == 0
	}) {
		k.Errorf("%s: there is left %v", t, left)
	}
}

// checkTaskEnds checks that the task is over and leaves nothing, and that
// containerd can delete it.
func (k *killer) checkTaskEnds(t trial, sockets []string) {
	if k.run != nil {
		var status client.Status
		var err error
		if !k.eventually(answerTimeout, func() bool {
			status, err = k.run.Status(k.ctx)
			return errdefs.IsNotFound(err) || err == nil && status.Status == client.Stopped
		}) {
			k.Errorf("%s: the task is %q, error %v", t, status.Status, err)
		}
	}
	// An engine that comes while containerd is still cleaning up is told to
	// come again.
	var err error
	if !k.eventually(settleTimeout, func() bool {
		err = nil
		if k.run != nil {
			_, err = k.run.Delete(k.ctx, client.WithProcessKill)
		}
		if err == nil || errdefs.IsNotFound(err) {
			err = k.engine.EndTask(k.ctx, k.c)
		}
		return err == nil
	}) {
		k.Errorf("%s: delete the task: %v", t, err)
	}
	k.run = nil
	left := k.settledResidue()
	for _, path := range sockets {
		if _, err := os.Lstat(path); err == nil {
			left = append(left, "socket "+path)
		}
	}
	if len(left) > 0 {
		k.Errorf("%s: there is left %q", t, left)
	}
	// What the killed one could not take away itself.
	for _, path := range k.stopFiles() {
		k.check(os.Remove(path))
	}
}

// endTask ends the container in peace.
func (k *killer) endTask() {
	k.Helper()
	k.check(k.engine.EndTask(k.ctx, k.c))
	k.run = nil
}

// restore is one with a kill in between.
func (k *killer) restore(t trial) {
	k.arm(t)
	answer := make(chan error, 1)
	var run *engine.Run
	go func() {
		var err error
		run, err = k.engine.Restore(k.ctx, k.c, k.whole)
		answer <- err
	}()
	k.reach(t, answer)
	ours := k.sockets()
	k.kill(t)
	err := k.waitAnswer(t, answer)
	switch {
	case err == nil && t.victim == "agent":
		// It came too late to do harm, or was started again.
		k.run = run
		rounds := k.waitNumbers(run.Output, workload.Rounds, 2)
		k.checkConsecutive(rounds[0], rounds)
		if err := k.requestCheckpoint(run, k.whole); err != nil {
			k.Errorf("%s: the next checkpoint: %v", t, err)
		}
		k.check(k.engine.EndTask(k.ctx, k.c))
	case err == nil && t.phase != "restored":
		k.Errorf("%s: restored", t)
		k.run = run
	case err == nil:
		k.run = run
	case t.containerSurvives() && !strings.Contains(strings.ToLower(err.Error()), t.victim):
		k.Errorf("%s: the error does not name it: %v", t, err)
	}
	k.checkTaskEnds(t, ours)
	if t.victim == "criu" && err != nil { // the task is deleted, and the log still there
		k.checkNamesLog(err)
	}
	k.checkWholeOrNothing(t, k.whole, true)
	k.step("%s: %v", t, err)
}

// waitAnswer waits for the answer to the call that was in progress.
func (k *killer) waitAnswer(t trial, answer <-chan error) error {
	k.Helper()
	select {
	case err := <-answer:
		return err
	case <-time.After(paced(answerTimeout)):
		k.Fatalf("%s: the call is not answered", t)
	case <-k.ctx.Done():
		k.Fatal(k.ctx.Err())
	}
	return nil
}

// checkWholeOrNothing checks that a directory holds a whole image set, or
// nothing if it may.
func (k *killer) checkWholeOrNothing(t trial, dir string, must bool) {
	k.Helper()
	entries, err := os.ReadDir(dir)
	k.check(err)
	if len(entries) == 0 && !must {
		return
	}
	if err := verify(dir, k.newDir()); err != nil {
		k.Errorf("%s: %v", t, errors.Join(err, fmt.Errorf("there is %v", entries)))
	}
	beside, err := filepath.Glob(filepath.Join(k.targets, ".*"))
	k.check(err)
	if len(beside) > 0 {
		k.Errorf("%s: there is left %v", t, beside)
	}
}
