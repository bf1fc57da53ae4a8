package integration

import (
	"os"
	"strings"

	"github.com/kata-checkpoint/kata-checkpoint/integration/parts"
	"github.com/kata-checkpoint/kata-checkpoint/integration/testbed"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// nerdctlLife: a container's life by nerdctl's own binary, from run to rm. It is checkpointed and shown as exited, started from the checkpoint, and
// all of that again; its log goes on without a gap. Of another container's checkpoint nerdctl says what does not fit.
func nerdctlLife(s *scenario) {
	n := s.nerdctl()
	volume := s.dir()
	id := n.container("run", "counter", "-d", "-v", volume+":/volume", parts.WorkloadImageName, workload.Path, "counter")
	n.counts("counter", 5)
	if out := n.ok("exec", "counter", "sh", "-c", "echo hello from $(hostname)"); out != "hello from "+id[:12] {
		s.Errorf("exec prints %q", out)
	}
	for _, checkpoint := range []string{"one", "two"} { // the second of a restored one
		n.ok("exec", "counter", "sh", "-c", "echo before >/volume/"+checkpoint)
		n.ok("checkpoint", "create", "counter", checkpoint)
		n.is("exited 137")
		n.ok("start", "--checkpoint", checkpoint, "counter")
		n.is("running 0")
		at := n.counts("counter", 5)
		n.counts("counter", at+5)
		if out := n.ok("exec", "counter", "cat", "/proc/1/comm", "/volume/"+checkpoint); out != "workload\nbefore" {
			s.Errorf("the restored container prints %q", out)
		}
		s.step("checkpointed, restored, and counts on")
	}

	n.container("create", "other", parts.WorkloadImageName, workload.Path, "idle")
	n.refused("the checkpoint does not fit this container: it was made of a container that runs", "start", "--checkpoint", "two", "other")
	n.ok("rm", "-f", "other")
	// nerdctl looks whether a name is taken once the checkpoint is made, and the container has been stopped for it.
	n.refused("already exists", "checkpoint", "create", "counter", "two")
	n.is("exited 137")
	s.step("refused what is another container's, and a name that is taken")

	n.ok("start", "counter")
	n.is("running 0")
	// A program that has only begun hears no signal yet.
	if !n.eventually(settleTimeout, func() bool { return strings.Count(n.ok("logs", "counter"), "tick 2 ") == 2 }) {
		n.Error("the counter does not start from 1 again")
	}
	n.ok("stop", "-t", "5", "counter")
	n.is("exited 2") // Go's way to end a first process by SIGTERM, which no signal kills from within
	n.ok("rm", "counter")
	if out := n.ok("ps", "-aq"); out != "" {
		s.Errorf("there is %q left", out)
	}
	s.step("started as any other, stopped and removed")
}

// nerdctl is the program, with a data root of the scenario's own.
type nerdctl struct{ command }

func (s *scenario) nerdctl() *nerdctl {
	s.Helper()
	p, err := parts.Find()
	s.check(err)
	program, err := p.Nerdctl(s.ctx) // takes minutes where it was never built
	s.check(err)
	s.step("nerdctl is there")
	return &nerdctl{command{
		scenario: s, program: program, options: []string{"--address", s.bed.Address, "--namespace", testbed.Namespace, "--data-root", s.dir()},
		env: append(os.Environ(), "PATH="+s.bed.Path),
	}}
}

// refused runs a command that fails with a word of why.
func (n *nerdctl) refused(why string, args ...string) {
	n.Helper()
	if out, err := n.try(args...); err == nil || !strings.Contains(out, why) {
		n.Errorf("nerdctl %s: %v, which does not say %q\n%s", strings.Join(args, " "), err, why, out)
	}
}

// container makes one of the scenario's by `run` or `create`, and gives its id.
func (n *nerdctl) container(command, name string, more ...string) string {
	n.Helper()
	args := []string{command, "--name", name, "--runtime", testbed.Runtime, "--net", "none", "--pull", "never"}
	id := n.ok(append(args, more...)...)
	n.owns(id)
	n.step("nerdctl %s %s", command, name)
	return id
}

// is checks what nerdctl shows of the counter.
func (n *nerdctl) is(want string) {
	n.Helper()
	if have := n.ok("inspect", "--format", "{{.State.Status}} {{.State.ExitCode}}", "counter"); have != want {
		n.Errorf("nerdctl shows the counter as %q, not %q", have, want)
	}
}
