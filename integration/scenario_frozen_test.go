// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"fmt"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/client"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// execRunningDuringCheckpoint: an exec keeps running after a
// checkpoint that leaves its container running, and is no part of the image
// set, which is whole without it.
func execRunningDuringCheckpoint(s *scenario) {
	c := s.create(counter("c"))
	first := s.run(c)
	s.waitNumbers(first.Output, workload.Ticks, 3)
	p := s.startExec(first, engine.Command{Args: []string{"sh", "-c", `i=0; while :; do i=$((i+1)); echo round $i; sleep 0.1; done`}})
	s.waitNumbers(p.Stdout, workload.Rounds, 3)

	s.checkpoint(first, false)
	at := len(s.printedNumbers(p.Stdout, workload.Rounds))
	s.checkConsecutive(1, s.waitNumbers(p.Stdout, workload.Rounds, at+5))
	ticks := len(s.printedNumbers(first.Output, workload.Ticks))
	s.waitNumbers(first.Output, workload.Ticks, ticks+3)
	s.step("both keep running")

	dir := s.checkpoint(first, true)
	// With the container, of which it is no part. Kata's shims end the VM
	// without waiting until they know how an exec has ended: then nobody does.
	s.waitExecExit(p, 137, client.UnknownExitStatus)
	s.waitExit(first, 137)
	before := s.printedNumbers(first.Output, workload.Ticks)
	restored := s.restore(c, dir)
	s.checkConsecutive(1, append(before, s.waitNumbers(restored.Output, workload.Ticks, 3)...))
	s.checkOtherVM(first, restored)
	// The workload, and the script that counts.
	if have := s.shell(restored, `cd /proc; for p in [0-9]*; do [ $p = $$ ] || tr '\0' ' ' <$p/cmdline; done 2>/dev/null; echo`); len(have) != 1 ||
		strings.TrimSpace(have[0]) != workload.Path+" counter" {
		s.Errorf("beside the exec that looks, there run %q", have)
	}
}

// execWhileFrozen: execs that come during a pause or a checkpoint wait for its
// end, within a bound, and nothing else waits for them.
func execWhileFrozen(s *scenario) {
	wait := paced(3 * time.Second).Round(time.Second)
	s.configure("exec_wait_timeout", wait.String())
	pod := s.startPod()
	c := pod.create(engine.Container{ID: "c", Args: []string{workload.Path, "memory", "--mib", "64", "--shm-mib", "0"}})
	run := s.run(c)
	other := pod.create(counter("other"))
	next := s.run(other)
	s.waitNumbers(run.Output, workload.Rounds, 1)
	s.waitNumbers(next.Output, workload.Ticks, 1)

	// One that comes during a pause starts with its end.
	s.check(run.Pause(s.ctx))
	started := make(chan error, 1)
	p := s.createExec(run, "early", "echo", "done")
	go func() { started <- p.Start(s.ctx) }()
	s.checkPrompt("state of the paused container", func() { s.checkStatus(run, client.Paused) })
	s.checkPrompt("state of the other container", func() { s.checkStatus(next, client.Running) })
	s.checkPrompt("statistics of the other container", func() {
		_, err := next.Metrics(s.ctx)
		s.check(err)
	})
	s.checkPrompt("an exec in the other container", func() { s.shell(next, "true") })
	select {
	case err := <-started:
		s.Fatalf("an exec was started in a frozen container (error %v)", err)
	default:
	}
	s.check(run.Resume(s.ctx))
	s.check(<-started)
	s.waitExecExit(p, 0)
	s.checkOutput("echo", p.Stdout, "done")
	s.step("an exec waited for the end of a pause")

	// Those that start while a pause begins have started before it, or start
	// after it.
	for i := range 5 {
		p := s.createExec(run, fmt.Sprintf("meanwhile-%d", i), "echo", "done")
		go func() { started <- p.Start(s.ctx) }()
		s.check(run.Pause(s.ctx))
		s.checkStatus(run, client.Paused)
		s.check(run.Resume(s.ctx))
		s.check(<-started)
		s.waitExecExit(p, 0)
		s.checkOutput("echo", p.Stdout, "done")
	}
	s.step("execs started around pauses")

	// One for which the pause is too long fails, and leaves nothing that is in
	// the way of others.
	s.check(run.Pause(s.ctx))
	p = s.createExec(run, "late", "echo", "done")
	begin := time.Now()
	err := p.Start(s.ctx)
	took := time.Since(begin)
	switch {
	case err == nil:
		s.Fatal("an exec was started in a frozen container")
	case !strings.Contains(err.Error(), "paused") || !strings.Contains(err.Error(), "exec_wait_timeout"):
		s.Errorf("the refusal does not say why: %v", err)
	case took < wait-time.Second || took > wait+paced(2*time.Second):
		s.Errorf("an exec waited %s for the end of a pause, and not %s", took, wait)
	}
	_, err = p.Delete(s.ctx, client.WithProcessKill)
	s.check(err)
	s.check(run.Resume(s.ctx))
	s.shell(run, "true")
	s.step("an exec gave up")

	// Probes, one after the other, while a checkpoint is made.
	n, stop := 0, make(chan struct{})
	probes := make(chan error)
	go func() {
		defer close(probes)
		for {
			select {
			case <-stop:
				return
			default:
			}
			if err := s.probe(run, n); err != nil {
				probes <- err
				return
			}
			n++
		}
	}()
	s.checkpoint(run, false)
	close(stop)
	for err := range probes {
		s.Errorf("probe: %v", err)
	}
	if n == 0 {
		s.Error("there was no probe during the checkpoint")
	}
	s.waitNumbers(run.Output, workload.Rounds, len(s.printedNumbers(run.Output, workload.Rounds))+2)
	s.step("%d probes outlived a checkpoint", n)

	// A paused container can be killed and deleted, with an exec that waits.
	s.check(run.Pause(s.ctx))
	p = s.createExec(run, "waiting", "true")
	go func() { started <- p.Start(s.ctx) }()
	s.check(run.Kill(s.ctx, syscall.SIGKILL))
	s.waitExit(run, 137)
	if err := <-started; err == nil {
		s.Error("an exec was started in a container that was killed")
	}
	s.checkStatus(next, client.Running)
	s.checkConsecutive(1, s.waitNumbers(next.Output, workload.Ticks, len(s.printedNumbers(next.Output, workload.Ticks))+3))
}

// probe is what a kubelet's liveness probe does.
func (s *scenario) probe(run *engine.Run, n int) error {
	p, err := s.engine.Exec(s.ctx, run, engine.Command{ID: fmt.Sprintf("probe-%d", n), Args: []string{"true"}})
	if err != nil {
		return err
	}
	status, err := p.Exit(s.ctx)
	if err == nil && status != 0 {
		err = fmt.Errorf("status %d", status)
	}
	return err
}
