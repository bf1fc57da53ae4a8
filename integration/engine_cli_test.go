// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// command is an engine's own program, as its users call it.
type command struct {
	*scenario
	program string
	// options come before those of each call.
	options []string
	env     []string // of this process where there is none
}

// run runs the program and gives what it prints.
func (c *command) run(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, c.program, slices.Concat(c.options, args)...)
	cmd.Env = c.env
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	return strings.TrimSpace(out.String()), err
}

// tryRun is run as long as the scenario lasts.
func (c *command) tryRun(args ...string) (string, error) { return c.run(c.ctx, args...) }

func (c *command) mustRun(args ...string) string {
	c.Helper()
	out, err := c.tryRun(args...)
	if err != nil {
		c.Fatalf("%s %s: %v\n%s", filepath.Base(c.program), strings.Join(args, " "), err, out)
	}
	return out
}

// waitCount waits until a container's log has so many numbers, and checks that
// none is lost or doubled.
func (c *command) waitCount(container string, atLeast int) int {
	c.Helper()
	var numbers []int
	if !c.eventually(settleTimeout, func() bool {
		var err error
		numbers, err = workload.Ticks(slices.Collect(strings.Lines(c.mustRun("logs", container))))
		c.check(err)
		return len(numbers) >= atLeast
	}) {
		c.Fatalf("the log has %d numbers, not %d", len(numbers), atLeast)
	}
	c.checkConsecutive(1, numbers)
	return len(numbers)
}

// startDaemon runs a program in a directory of its own until the scenario's
// end, and gives the name of its log.
func (s *scenario) startDaemon(dir, program string, args ...string) (log string) {
	s.Helper()
	s.check(os.MkdirAll(dir, 0o700))
	log = filepath.Join(s.testbed.Dir, "log", filepath.Base(program))
	out, err := os.Create(log)
	s.check(err)
	defer out.Close()
	cmd := exec.Command(program, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
	s.check(cmd.Start())
	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(ended)
	}()
	s.afterContainers(func() error {
		_ = cmd.Process.Signal(syscall.SIGTERM) // it may have ended
		select {
		case <-ended:
		case <-time.After(paced(settleTimeout)):
			_ = cmd.Process.Kill()
			<-ended
		}
		return os.RemoveAll(dir)
	})
	return log
}
