// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/client"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/parts"
	"github.com/kata-checkpoint/kata-checkpoint/integration/testbed"
)

// withID gives a container an ID of the scenario's, and the workload image.
func (s *scenario) withID(c engine.Container) engine.Container {
	c.ID, c.Image = s.id(c.ID), parts.WorkloadImageName
	return c
}

// create makes a container of the workload image. Nothing runs yet.
func (s *scenario) create(c engine.Container) client.Container {
	s.Helper()
	container, err := s.engine.Create(s.ctx, s.withID(c))
	s.check(err)
	return container
}

// run starts a container.
func (s *scenario) run(c client.Container) *engine.Run {
	s.Helper()
	begin := time.Now()
	run, err := s.engine.Start(s.ctx, c)
	s.check(err)
	observe(time.Since(begin))
	s.step("started %s", c.ID())
	return run
}

// checkpoint writes the image set of a task to a new directory, after which the
// task has stopped, or keeps running.
func (s *scenario) checkpoint(run *engine.Run, exit bool) (dir string) {
	s.Helper()
	dir = s.newDir()
	s.check(s.engine.CheckpointTo(s.ctx, run, dir, exit))
	s.step("checkpointed %s", run.ID())
	return dir
}

// restore starts a container from an image set.
func (s *scenario) restore(c client.Container, dir string) *engine.Run {
	s.Helper()
	run, err := s.engine.Restore(s.ctx, c, dir)
	s.check(err)
	s.step("restored %s", c.ID())
	return run
}

// remove kills a container and removes it before the scenario's end.
func (s *scenario) remove(c client.Container) {
	s.Helper()
	s.check(s.engine.Remove(s.ctx, c.ID()))
	s.step("removed %s", c.ID())
}

// createExec makes an exec that is not started yet.
func (s *scenario) createExec(run *engine.Run, id string, args ...string) *engine.Process {
	s.Helper()
	p, err := s.engine.Add(s.ctx, run, engine.Command{ID: id, Args: args})
	s.check(err)
	return p
}

// startExec starts a command in a task, and leaves it running.
func (s *scenario) startExec(run *engine.Run, c engine.Command) *engine.Process {
	s.Helper()
	s.execs++
	c.ID = fmt.Sprintf("exec-%d", s.execs)
	p, err := s.engine.Exec(s.ctx, run, c)
	s.check(err)
	return p
}

// shell runs a script in a task and returns the lines that it prints. A script
// that fails ends the scenario.
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

// ctr runs containerd's command line tool.
func (s *scenario) ctr(args ...string) string {
	s.Helper()
	program := ""
	for dir := range strings.SplitSeq(s.testbed.Path, ":") {
		if path := filepath.Join(dir, "ctr"); program == "" && exec.Command(path, "--version").Run() == nil {
			program = path
		}
	}
	cmd := exec.CommandContext(s.ctx, program, args...)
	cmd.Env = append(os.Environ(), "CONTAINERD_ADDRESS="+s.testbed.Address, "CONTAINERD_NAMESPACE="+testbed.Namespace)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		s.Fatalf("ctr %s: %v\n%s%s", strings.Join(args, " "), err, out, stderr.Bytes())
	}
	s.step("ctr %s", strings.Join(args, " "))
	return string(out)
}
