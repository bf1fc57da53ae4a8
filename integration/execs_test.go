package integration

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
)

// startExec starts a command in a task, and leaves it running.
func (s *scenario) startExec(run *engine.Run, c engine.Command) *engine.Process {
	s.Helper()
	s.execs++
	c.ID = fmt.Sprintf("exec-%d", s.execs)
	p, err := s.engine.Exec(s.ctx, run, c)
	s.check(err)
	return p
}

// waitExecExit checks the status that a command ends with: one of those wanted.
func (s *scenario) waitExecExit(p *engine.Process, want ...uint32) {
	s.Helper()
	status, err := p.Exit(s.ctx)
	s.check(err)
	if !slices.Contains(want, status) {
		s.Errorf("%s ended with status %d, not %d; it printed %q and %q", p.ID(), status, want, p.Stdout.Lines(), p.Stderr.Lines())
	}
}

// shell runs a script in a task, and gives the lines that it prints. One that fails ends the scenario.
func (s *scenario) shell(run *engine.Run, script string) []string {
	s.Helper()
	p := s.startExec(run, engine.Command{Args: []string{"sh", "-c", script}})
	status, err := p.Exit(s.ctx)
	s.check(err)
	if status != 0 {
		s.Fatalf("%s: status %d, stderr %q", script, status, p.Stderr.Lines())
	}
	return p.Stdout.Lines()
}

// checkOutput checks what a command has printed to one of its streams.
func (s *scenario) checkOutput(what string, out *engine.Output, want ...string) {
	s.Helper()
	if have := out.Lines(); !slices.Equal(have, want) {
		s.Errorf("%s: printed %q, not %q", what, have, want)
	}
}

// waitLine waits until a line with the text is printed, after the first `after` lines.
func (s *scenario) waitLine(out *engine.Output, after int, text string) {
	s.Helper()
	s.check(out.Wait(s.ctx, func(lines []string) (bool, error) {
		return len(lines) > after && slices.ContainsFunc(lines[after:], func(line string) bool { return strings.Contains(line, text) }), nil
	}))
}

// eventually asks until there is a yes, or the limit is over, and tells which.
func (s *scenario) eventually(limit time.Duration, ask func() bool) bool {
	s.Helper()
	for deadline := time.Now().Add(limit); ; {
		if ask() {
			return true
		}
		if time.Now().After(deadline) || s.ctx.Err() != nil {
			return false
		}
		time.Sleep(20 * time.Millisecond) //nolint:forbidigo // between two looks
	}
}
