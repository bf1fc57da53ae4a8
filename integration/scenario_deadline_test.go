// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/client"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// deadline: a checkpoint of 256 MiB keeps nobody waiting who asks for the
// container's state. One for which the caller's time or the configured time is
// too short leaves nothing, the container keeps running, and the error says
// why.
func deadline(s *scenario) {
	remembering := func(id, mib string) (client.Container, *engine.Run) {
		c := s.create(engine.Container{ID: id, Args: []string{workload.Path, "memory", "--mib", mib, "--shm-mib", "0", "--every", "500ms"}})
		run := s.run(c)
		s.waitNumbers(run.Output, workload.Rounds, 2)
		return c, run
	}
	c, run := remembering("large", "256")
	took, err := s.pollStateDuring(run, func() error { return s.engine.CheckpointTo(s.ctx, run, s.newDir(), false) })
	s.check(err)
	s.step("checkpointed, which took %s", took.Round(time.Millisecond))

	// The caller's deadline, with all images written.
	dir := s.newDir()
	const written = "checkpoint-copy-images"
	s.stopAt(written)
	ctx, cancel := context.WithTimeout(s.ctx, 2*took+paced(3*time.Second))
	defer cancel()
	took, err = s.pollStateDuring(run, func() error { return s.engine.CheckpointTo(ctx, run, dir, true) })
	// containerd does not keep the kind of this error when it comes from a
	// shim.
	if err == nil || !strings.Contains(err.Error(), context.DeadlineExceeded.Error()) {
		s.Errorf("a checkpoint for which there was no time ended after %s with: %v", took, err)
	}
	s.checkUndone(run, dir)
	if !s.eventually(settleTimeout, func() bool { return s.hasLogged("failed to checkpoint container") }) {
		s.Error("the log has no word of the checkpoint that failed")
	}
	s.remove(c)

	// The one of the configuration, in an operation that hangs.
	limit := paced(10 * time.Second).Round(time.Second) // covers the start of the container, too
	s.configure("checkpoint_timeout", limit.String())
	_, run = remembering("small", "16")
	s.stopAt("checkpoint-prepare")
	took, err = s.pollStateDuring(run, func() error { return s.engine.CheckpointTo(s.ctx, run, dir, true) })
	if err == nil || !strings.Contains(err.Error(), "checkpoint_timeout of "+limit.String()+" has expired") {
		s.Errorf("a checkpoint that hangs ended after %s with: %v", took, err)
	}
	s.checkUndone(run, dir)
	s.check(s.engine.CheckpointTo(s.ctx, run, dir, true))
	s.step("checkpointed after all")
	s.waitExit(run, 137)
}

// pollStateDuring asks for the state of a task while something is done, and
// says how long that took.
func (s *scenario) pollStateDuring(run *engine.Run, do func() error) (time.Duration, error) {
	s.Helper()
	begin, done := time.Now(), make(chan error, 1)
	go func() { done <- do() }()
	for n := 0; ; n++ {
		s.checkPrompt("state during a checkpoint", func() {
			status, err := run.Status(s.ctx)
			if err != nil || status.Status != client.Running && status.Status != client.Paused && status.Status != client.Stopped {
				s.Errorf("state during a checkpoint: %v, error %v", status.Status, err)
			}
		})
		select {
		case err := <-done:
			if n == 0 {
				s.Error("the state was asked for only once")
			}
			return time.Since(begin), err
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// checkUndone checks that a checkpoint that has failed has left nothing, and
// that the container keeps running.
func (s *scenario) checkUndone(run *engine.Run, dir string) {
	s.Helper()
	at := len(s.printedNumbers(run.Output, workload.Rounds))
	s.checkConsecutive(1, s.waitNumbers(run.Output, workload.Rounds, at+2))
	s.checkStatus(run, client.Running)
	s.checkEmpty(dir)
	if left, err := s.testbed.Exchanged("checkpoint-*"); err != nil || len(left) > 0 {
		s.Errorf("there is %q, error %v", left, err)
	}
	s.step("it keeps running")
}
