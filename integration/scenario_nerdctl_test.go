package integration

import (
	"net"
	"os"
	"strings"

	"github.com/kata-checkpoint/kata-checkpoint/integration/parts"
	"github.com/kata-checkpoint/kata-checkpoint/integration/testbed"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// nerdctlLife: a container's life by nerdctl's own binary, from run to rm. It is checkpointed and shown as exited, started from the checkpoint, and
// all of that again; its log goes on without a gap. Of another container's checkpoint nerdctl says what does not fit. A restored container has its
// network and its restart policy.
func nerdctlLife(s *scenario) {
	n := s.nerdctl()
	volume := s.dir()
	id := n.container("run", "counter", "-d", "--net", "none", "-v", volume+":/volume", parts.WorkloadImageName, workload.Path, "counter")
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

	n.container("create", "other", "--net", "none", parts.WorkloadImageName, workload.Path, "idle")
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
	s.step("started as any other, stopped and removed")

	n.networked()
	n.restarted()
	if out := n.ok("ps", "-aq"); out != "" {
		s.Errorf("there is %q left", out)
	}
}

// networked: a container on a network of nerdctl's is reached there, and its restored copy, too.
func (n *nerdctl) networked() {
	n.Helper()
	n.container("run", "relay", append([]string{"-d", "--net", n.network, parts.WorkloadImageName}, relay...)...)
	if !n.eventually(settleTimeout, func() bool { return n.ok("logs", "relay") != "" }) { // it listens before it prints
		n.Error("relay does not begin")
	}
	reached := func(answer string) {
		address := n.ok("exec", "relay", "sh", "-c", "ip -4 -o address show dev eth0 | awk '{sub(\"/.*\", \"\", $4); print $4}'")
		if hosts := n.ok("exec", "relay", "cat", "/etc/hosts"); !strings.Contains(hosts, address) {
			n.Errorf("its /etc/hosts does not have its address %s:\n%s", address, hosts)
		}
		n.answers(net.JoinHostPort(address, relayPort), "say in", answer)
	}
	reached("1 in")
	n.ok("checkpoint", "create", "relay", "relayed")
	n.ok("start", "--checkpoint", "relayed", "relay")
	reached("2 in")
	n.ok("rm", "-f", "relay")
	n.step("restored, and reached on its network")
}

// restarted: a restored container that ends is started from its beginning where that is its policy.
func (n *nerdctl) restarted() {
	n.Helper()
	n.container("run", "steady", "-d", "--net", "none", "--restart", "always", "--annotation", "kata-checkpoint.dev/after=leave-running",
		parts.WorkloadImageName, workload.Path, "obedient")
	begins := func() (times int) {
		for line := range strings.Lines(n.ok("logs", "steady")) {
			if strings.TrimSpace(line) == "round 1" {
				times++
			}
		}
		return times / 2 // it says so on stdout and on stderr
	}
	if !n.eventually(settleTimeout, func() bool { return begins() == 1 }) {
		n.Error("steady does not begin")
	}
	n.ok("checkpoint", "create", "steady", "steady")
	n.ok("stop", "-t", "5", "steady")
	n.ok("start", "--checkpoint", "steady", "steady")
	n.ok("exec", "steady", "kill", "-TERM", "1")
	if !n.eventually(answerTimeout, func() bool { return begins() == 2 }) {
		n.Errorf("steady was restored and has ended, and has begun %d times, not twice", begins())
	}
	n.ok("rm", "-f", "steady")
	n.step("started again by its policy")
}

// nerdctl is the program, with a data root of the scenario's own.
type nerdctl struct {
	command
	// network is the name of one that containers can be on.
	network string
}

func (s *scenario) nerdctl() *nerdctl {
	s.Helper()
	p, err := parts.Find()
	s.check(err)
	program, err := p.Nerdctl(s.ctx) // takes minutes where it was never built
	s.check(err)
	s.step("nerdctl is there")
	options, network := s.bed.CNIOptions()
	return &nerdctl{command{
		scenario: s, program: program,
		options: append([]string{"--address", s.bed.Address, "--namespace", testbed.Namespace, "--data-root", s.dir()}, options...),
		env:     append(os.Environ(), "PATH="+s.bed.Path),
	}, network}
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
	args := []string{command, "--name", name, "--runtime", testbed.Runtime, "--pull", "never"}
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
