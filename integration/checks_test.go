// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/errdefs"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
)

// poll asks every 20 ms until the answer is yes or the limit is over, and
// reports which.
func poll(ctx context.Context, limit time.Duration, ask func() bool) bool {
	for deadline := time.Now().Add(limit); ; {
		if ask() {
			return true
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			return false
		}
		time.Sleep(20 * time.Millisecond) //nolint:forbidigo // between two looks
	}
}

// eventually polls a condition, for a [paced] limit.
func (s *scenario) eventually(limit time.Duration, ask func() bool) bool {
	s.Helper()
	return poll(s.ctx, paced(limit), ask)
}

// waitNumbers waits until a workload has printed n numbers, and returns all
// that it has printed by then.
func (s *scenario) waitNumbers(out *engine.Output, parse func([]string) ([]int, error), n int) []int {
	s.Helper()
	var numbers []int
	s.check(out.Wait(s.ctx, func(lines []string) (bool, error) {
		var err error
		numbers, err = parse(lines)
		return len(numbers) >= n, err
	}))
	return numbers
}

// printedNumbers returns the numbers that a workload has printed so far.
func (s *scenario) printedNumbers(out *engine.Output, parse func([]string) ([]int, error)) []int {
	s.Helper()
	numbers, err := parse(out.Lines())
	s.check(err)
	return numbers
}

// checkConsecutive checks that numbers follow each other from first on, none
// lost and none doubled.
func (s *scenario) checkConsecutive(first int, numbers []int) {
	s.Helper()
	for i, n := range numbers {
		if n != first+i {
			s.Fatalf("after %v comes %d, not %d", numbers[max(0, i-3):i], n, first+i)
		}
	}
}

// waitLine waits until a line with the text is printed, after the first `after`
// lines.
func (s *scenario) waitLine(out *engine.Output, after int, text string) {
	s.Helper()
	s.check(out.Wait(s.ctx, func(lines []string) (bool, error) {
		return len(lines) > after && slices.ContainsFunc(lines[after:], func(line string) bool { return strings.Contains(line, text) }), nil
	}))
}

// checkOutput checks all that was printed to a stream.
func (s *scenario) checkOutput(what string, out *engine.Output, want ...string) {
	s.Helper()
	if have := out.Lines(); !slices.Equal(have, want) {
		s.Errorf("%s: printed %q, not %q", what, have, want)
	}
}

// checkSilent checks that a task prints nothing for a second, which is time for
// ten rounds of a workload.
func (s *scenario) checkSilent(out *engine.Output) {
	s.Helper()
	n := len(out.Lines())
	ctx, cancel := context.WithTimeout(s.ctx, time.Second)
	defer cancel()
	if err := out.Wait(ctx, func(lines []string) (bool, error) { return len(lines) > n, nil }); err == nil {
		s.Errorf("printed %q", out.Lines()[n:])
	}
}

// checkPrompt checks that something does not wait for a frozen container to be
// thawed.
func (s *scenario) checkPrompt(what string, do func()) {
	s.Helper()
	begin := time.Now()
	do()
	if took := time.Since(begin); took > paced(2*time.Second) {
		s.Errorf("%s took %s", what, took)
	}
}

// waitExit waits for the end of a task, checks its exit status and deletes it.
// All its output has arrived then.
func (s *scenario) waitExit(run *engine.Run, want uint32) {
	s.Helper()
	status, err := run.Exit(s.ctx)
	s.check(err)
	if status != want {
		s.Errorf("%s exited with status %d, not %d", run.ID(), status, want)
	}
	_, err = run.Delete(s.ctx)
	s.check(err)
}

// waitExecExit waits for the end of an exec and checks its exit status: one of
// those wanted.
func (s *scenario) waitExecExit(p *engine.Process, want ...uint32) {
	s.Helper()
	status, err := p.Exit(s.ctx)
	s.check(err)
	if !slices.Contains(want, status) {
		s.Errorf("%s exited with status %d, not %d; it printed %q and %q", p.ID(), status, want, p.Stdout.Lines(), p.Stderr.Lines())
	}
}

// checkNamesLog checks that an error is one line, with the path of CRIU's log.
func (s *scenario) checkNamesLog(err error) {
	s.Helper()
	text := err.Error()
	_, path, _ := strings.Cut(text, "CRIU's log is in ")
	path, _, _ = strings.Cut(path, " (KC-")
	if log, err := os.ReadFile(path); strings.Contains(text, "\n") || err != nil || len(log) == 0 {
		s.Errorf("CRIU's log of %q has %d bytes (%v)", text, len(log), err)
	}
}

// checkHasCode checks that an error of ours ends with a code. An engine may name
// the error's class behind it.
func (s *scenario) checkHasCode(err error) {
	s.Helper()
	text := strings.TrimSuffix(err.Error(), ": "+errdefs.Resolve(err).Error())
	if _, code := errcode.Split(text); code.Name() == "" {
		s.Errorf("this error does not end with a code: %v", err)
	}
}

// checkStatus checks the status of a task.
func (s *scenario) checkStatus(run *engine.Run, want client.ProcessStatus) {
	s.Helper()
	status, err := run.Status(s.ctx)
	s.check(err)
	if status.Status != want {
		s.Fatalf("%s is %s, not %s", run.ID(), status.Status, want)
	}
}

// checkExitEvents checks the exit statuses that containerd has reported for a
// container, one for each event.
func (s *scenario) checkExitEvents(c client.Container, want ...uint32) {
	s.Helper()
	var have []uint32
	s.eventually(settleTimeout, func() bool {
		have = s.events.Exits(c.ID())
		return len(have) >= len(want)
	})
	if !slices.Equal(have, want) {
		s.Errorf("%s: the exit events have the statuses %v, not %v", c.ID(), have, want)
	}
}

// checkStateEvents checks what containerd has reported for a container apart
// from its exits, in order. A path that is not given may be any.
func (s *scenario) checkStateEvents(c client.Container, want ...string) {
	s.Helper()
	fits := func(have, want string) bool {
		return have == want || want == "checkpointed" && strings.HasPrefix(have, "checkpointed /")
	}
	var have []string
	if !s.eventually(settleTimeout, func() bool {
		have = slices.DeleteFunc(s.events.States(c.ID()), func(what string) bool { return strings.HasPrefix(what, "exit ") })
		return len(have) >= len(want)
	}) || !slices.EqualFunc(have, want, fits) {
		s.Errorf("%s: the events are %q, not %q", c.ID(), have, want)
	}
}

// checkKeepsRunning checks that a workload runs and has lost nothing.
func (s *scenario) checkKeepsRunning(run *engine.Run) {
	s.Helper()
	s.checkStatus(run, client.Running)
	at := len(run.Output.Lines())
	s.check(run.Output.Wait(s.ctx, func(lines []string) (bool, error) { return len(lines) > at+2, nil }))
	parse := workload.Rounds
	if strings.HasPrefix(run.Output.Lines()[at], "tick") {
		parse = workload.Ticks
	}
	s.checkConsecutive(1, s.printedNumbers(run.Output, parse))
}

// checkKeepsCounting checks that a counter counts on and has lost no number.
func (s *scenario) checkKeepsCounting(run *engine.Run) {
	s.Helper()
	at := len(s.printedNumbers(run.Output, workload.Ticks))
	s.checkConsecutive(1, s.waitNumbers(run.Output, workload.Ticks, at+5))
}

// checkContinuesAfter checks that a restored workload continues after the
// number that it had at the checkpoint.
func (s *scenario) checkContinuesAfter(run *engine.Run, at int) {
	s.Helper()
	after := s.waitNumbers(run.Output, workload.Rounds, 5)
	if after[0] != at+1 {
		s.Errorf("%s continues with %d, and was at %d", run.ID(), after[0], at)
	}
	s.checkConsecutive(after[0], after)
}

// bootID returns the ID of the one boot of a kernel that a task has run in.
func (s *scenario) bootID(run *engine.Run) string {
	s.Helper()
	boots := workload.Boots(run.Output.Lines())
	if len(boots) != 1 {
		s.Fatalf("%s was in the boots %v, not in one", run.ID(), boots)
	}
	return boots[0]
}

// checkOtherVM checks that a restored task runs in another VM than the first.
func (s *scenario) checkOtherVM(first, restored *engine.Run) {
	s.Helper()
	if a, b := s.bootID(first), s.bootID(restored); a == b {
		s.Errorf("restored in the same boot %s", a)
	}
}

// settledResidue lists the processes, mounts and files that are left while no
// task exists, after what goes away on its own has gone.
func (s *scenario) settledResidue() (left []string) {
	s.Helper()
	s.eventually(settleTimeout, func() bool {
		var err error
		left, err = s.testbed.Residue(s.ids...)
		s.check(err)
		return len(left) == 0
	})
	return left
}

// checkNothingRuns checks that nothing is left of the tasks that have been.
func (s *scenario) checkNothingRuns() {
	s.Helper()
	if left := s.settledResidue(); len(left) > 0 {
		s.Errorf("there is %q", left)
	}
}
