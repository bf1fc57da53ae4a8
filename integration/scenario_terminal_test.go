// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"strings"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/errdefs"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// terminal: after a restore, somebody at a container's terminal can continue:
// it reads and writes, has the right size, is the session's controlling one,
// and ^C reaches the foreground.
func terminal(s *scenario) {
	keys := newTerminalInput()
	at := s.engine.With(engine.Streams{Stdin: keys, Terminal: true})
	c, err := at.Create(s.ctx, s.withID(engine.Container{ID: "c", Args: []string{workload.Path, "terminal"}}))
	s.check(err)
	first, err := at.Start(s.ctx, c)
	s.check(err)
	s.step("started")
	s.check(first.Resize(s.ctx, 81, 25))
	keys.send("tell\n")
	s.waitLine(first.Output, 0, "line 1: 25 rows, 81 columns")
	keys.send("through\n")
	s.waitLine(first.Output, 0, "line 2: through")
	dir := s.checkpoint(first, true)
	s.waitExit(first, 137)
	s.check(keys.Close())
	s.checkTerminalNeeded(c, dir)

	keys = newTerminalInput()
	defer keys.Close()
	restored, err := s.engine.With(engine.Streams{Stdin: keys, Terminal: true}).Restore(s.ctx, c, dir)
	s.check(err)
	s.step("restored")
	keys.send("typed\n")
	s.waitLine(restored.Output, 0, "line 3: typed")
	if all := strings.Join(restored.Output.Lines(), "\n"); strings.Count(all, "typed") != 2 {
		s.Errorf("what is typed is not shown once by the terminal and once by the program: %q", all)
	}
	keys.send("\x03")
	s.waitLine(restored.Output, 0, "interrupted")
	s.check(restored.Resize(s.ctx, 101, 37))
	keys.send("tell\n")
	s.waitLine(restored.Output, 0, "line 4: 37 rows, 101 columns")
	keys.send("through\n")
	s.waitLine(restored.Output, 0, "line 5: through")
	keys.send("exit 6\n")
	s.waitExit(restored, 6)
}

// checkTerminalNeeded checks that a restore that gives a container no terminal is
// refused and leaves no task.
func (s *scenario) checkTerminalNeeded(c client.Container, dir string) {
	s.Helper()
	_, err := s.engine.Restore(s.ctx, c, dir)
	if err == nil || !strings.Contains(err.Error(), "with a terminal and this one has none") {
		s.Errorf("restored without a terminal: %v", err)
	}
	if task, err := c.Task(s.ctx, nil); !errdefs.IsNotFound(err) {
		s.Errorf("there is left the task %v, error %v", task, err)
	}
}
