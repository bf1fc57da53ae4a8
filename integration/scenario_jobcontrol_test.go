// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"strings"
	"syscall"

	"github.com/containerd/containerd/v2/pkg/oci"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// jobControl: what is stopped by a signal comes back stopped, and a restored
// container and its execs can be stopped and continued.
func jobControl(s *scenario) {
	c := s.create(counter("c"))
	run := s.run(c)
	s.waitNumbers(run.Output, workload.Ticks, 3)
	// Of an exec, which leaves it to init.
	stopped := s.shell(run, "sleep 4321 >/dev/null 2>&1 & echo $!")
	s.shell(run, "kill -STOP "+stopped[0])
	for range 2 {
		s.checkStops(run)
		s.check(run.Kill(s.ctx, syscall.SIGSTOP))
		s.waitProcessState(run, "1", "T")
		printed := s.printedNumbers(run.Output, workload.Ticks)
		dir := s.checkpoint(run, true)
		s.waitExit(run, 137)
		run = s.restore(c, dir)
		for _, pid := range append([]string{"1"}, stopped...) {
			s.waitProcessState(run, pid, "T")
		}
		if have := s.printedNumbers(run.Output, workload.Ticks); len(have) > 0 {
			s.Errorf("stopped, and it has printed %v", have)
		}
		s.check(run.Kill(s.ctx, syscall.SIGCONT))
		ticks := s.waitNumbers(run.Output, workload.Ticks, 3)
		s.checkConsecutive(printed[len(printed)-1]+1, ticks)
	}
	s.shell(run, "kill -CONT "+strings.Join(stopped, " "))
	for _, pid := range stopped {
		s.waitProcessState(run, pid, "S")
	}
	s.checkStops(run)
}

// otherUser: while a process has more than its container, as one that an exec as
// root has left in a container of a user, a checkpoint is refused, and not the
// restore.
func otherUser(s *scenario) {
	spec := engine.Container{ID: "c", Args: []string{workload.Path, "counter", "--file", "/dev/shm/count"}}
	spec.Spec = append(spec.Spec, oci.WithUIDGID(1000, 1000), oci.WithCapabilities(nil))
	c := s.create(spec)
	run := s.run(c)
	s.waitNumbers(run.Output, workload.Ticks, 3)
	p := s.startExec(run, engine.Command{Args: []string{"sh", "-c", "sleep 4321 >/dev/null 2>&1 & echo $!"}, Change: func(p *specs.Process) { p.User = specs.User{} }})
	s.waitExecExit(p, 0)
	s.checkRefused("a process of another user", run, s.newDir(), "the process sleep", "has the user 0, which the container cannot become", "terminate it before the checkpoint")
	s.checkCountsOn(run)
	p = s.startExec(run, engine.Command{Args: []string{"kill", "-KILL", p.Stdout.Lines()[0]}, Change: func(p *specs.Process) { p.User = specs.User{} }})
	s.waitExecExit(p, 0)
	dir := s.checkpoint(run, true)
	s.waitExit(run, 137)
	s.checkCountsOn(s.restore(c, dir))
}

// checkStops stops and continues a counter and an exec.
func (s *scenario) checkStops(run *engine.Run) {
	s.Helper()
	p := s.startExec(run, engine.Command{Args: []string{"sh", "-c", "echo $$; exec sleep 4321"}})
	s.check(p.Stdout.Wait(s.ctx, func(lines []string) (bool, error) { return len(lines) == 1, nil }))
	pid := p.Stdout.Lines()[0]
	s.waitProcessState(run, pid, "S")
	for _, signaled := range []struct {
		kill func(syscall.Signal) error
		pid  string
	}{
		{func(sig syscall.Signal) error { return run.Kill(s.ctx, sig) }, "1"},
		{func(sig syscall.Signal) error { return p.Kill(s.ctx, sig) }, pid},
	} {
		s.check(signaled.kill(syscall.SIGSTOP))
		s.waitProcessState(run, signaled.pid, "T")
		s.check(signaled.kill(syscall.SIGCONT))
		s.waitProcessState(run, signaled.pid, "SR")
	}
	s.checkCountsOn(run)
	s.check(p.Kill(s.ctx, syscall.SIGKILL))
	s.waitExecExit(p, 137)
}

// checkCountsOn checks that a counter, restored or not, counts on.
func (s *scenario) checkCountsOn(run *engine.Run) {
	s.Helper()
	ticks := s.waitNumbers(run.Output, workload.Ticks, len(s.printedNumbers(run.Output, workload.Ticks))+3)
	s.checkConsecutive(ticks[0], ticks)
}

// waitProcessState waits until a process is in one of the states.
func (s *scenario) waitProcessState(run *engine.Run, pid, states string) {
	s.Helper()
	state := ""
	if !s.eventually(settleTimeout, func() bool {
		fields := strings.Fields(s.shell(run, "grep State /proc/"+pid+"/status")[0])
		state = fields[1]
		return strings.Contains(states, state)
	}) {
		s.Fatalf("process %s is in the state %s, not one of %s", pid, state, states)
	}
	s.step("process %s is in the state %s", pid, state)
}
