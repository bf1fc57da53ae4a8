// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"net"
	"os"
	"strings"

	"github.com/kata-checkpoint/kata-checkpoint/integration/parts"
	"github.com/kata-checkpoint/kata-checkpoint/integration/testbed"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// nerdctlLife: a container's life by nerdctl's own binary, from run to rm. It
// is checkpointed and shown as exited, started from the checkpoint, and all of
// that again; its log continues without a gap. Of another container's
// checkpoint nerdctl says what does not fit. A restored container has its
// network and its restart policy.
func nerdctlLife(s *scenario) {
	n := s.nerdctl()
	volume := s.newDir()
	id := n.container("run", "counter", "-d", "--net", "none", "-v", volume+":/volume", parts.WorkloadImageName, workload.Path, "counter")
	n.waitCount("counter", 5)
	if out := n.mustRun("exec", "counter", "sh", "-c", "echo hello from $(hostname)"); out != "hello from "+id[:12] {
		s.Errorf("exec prints %q", out)
	}
	for _, checkpoint := range []string{"one", "two"} { // the second of a restored one
		n.mustRun("exec", "counter", "sh", "-c", "echo before >/volume/"+checkpoint)
		n.mustRun("checkpoint", "create", "counter", checkpoint)
		n.checkCounter("exited 137")
		n.mustRun("start", "--checkpoint", checkpoint, "counter")
		n.checkCounter("running 0")
		at := n.waitCount("counter", 5)
		n.waitCount("counter", at+5)
		if out := n.mustRun("exec", "counter", "cat", "/proc/1/comm", "/volume/"+checkpoint); out != "workload\nbefore" {
			s.Errorf("the restored container prints %q", out)
		}
		s.step("checkpointed, restored, and counts on")
	}

	n.container("create", "other", "--net", "none", parts.WorkloadImageName, workload.Path, "idle")
	n.checkFails("the checkpoint does not fit this container: it was made of a container that runs", "start", "--checkpoint", "two", "other")
	n.mustRun("rm", "-f", "other")
	// nerdctl looks whether a name is taken once the checkpoint is made, and
	// the container has been stopped for it.
	n.checkFails("already exists", "checkpoint", "create", "counter", "two")
	n.checkCounter("exited 137")
	s.step("refused what is another container's, and a name that is taken")

	n.mustRun("start", "counter")
	n.checkCounter("running 0")
	// A program that has only begun hears no signal yet.
	if !n.eventually(settleTimeout, func() bool { return strings.Count(n.mustRun("logs", "counter"), "tick 2 ") == 2 }) {
		n.Error("the counter does not start from 1 again")
	}
	n.mustRun("stop", "-t", "5", "counter")
	n.checkCounter("exited 2") // how Go exits on SIGTERM as init, which no signal kills from within
	n.mustRun("rm", "counter")
	s.step("started as any other, stopped and removed")

	n.checkNetwork()
	n.checkRestartPolicy()
	if out := n.mustRun("ps", "-aq"); out != "" {
		s.Errorf("there is %q left", out)
	}
}

// checkNetwork: a container on a network of nerdctl's is reached there, and its
// restored copy, too.
func (n *nerdctl) checkNetwork() {
	n.Helper()
	n.container("run", "relay", append([]string{"-d", "--net", n.network, parts.WorkloadImageName}, relay...)...)
	if !n.eventually(settleTimeout, func() bool { return n.mustRun("logs", "relay") != "" }) { // it listens before it prints
		n.Error("relay does not begin")
	}
	reached := func(answer string) {
		address := n.mustRun("exec", "relay", "sh", "-c", "ip -4 -o address show dev eth0 | awk '{sub(\"/.*\", \"\", $4); print $4}'")
		if hosts := n.mustRun("exec", "relay", "cat", "/etc/hosts"); !strings.Contains(hosts, address) {
			n.Errorf("its /etc/hosts does not have its address %s:\n%s", address, hosts)
		}
		n.checkAnswer(net.JoinHostPort(address, relayPort), "say in", answer)
	}
	reached("1 in")
	n.mustRun("checkpoint", "create", "relay", "relayed")
	n.mustRun("start", "--checkpoint", "relayed", "relay")
	reached("2 in")
	n.mustRun("rm", "-f", "relay")
	n.step("restored, and reached on its network")
}

// checkRestartPolicy: a restored container that ends is started from its
// beginning where that is its policy.
func (n *nerdctl) checkRestartPolicy() {
	n.Helper()
	n.container("run", "steady", "-d", "--net", "none", "--restart", "always", "--annotation", "kata-checkpoint.dev/after=leave-running",
		parts.WorkloadImageName, workload.Path, "obedient")
	begins := func() (times int) {
		for line := range strings.Lines(n.mustRun("logs", "steady")) {
			if strings.TrimSpace(line) == "round 1" {
				times++
			}
		}
		return times / 2 // it says so on stdout and on stderr
	}
	if !n.eventually(settleTimeout, func() bool { return begins() == 1 }) {
		n.Error("steady does not begin")
	}
	n.mustRun("checkpoint", "create", "steady", "steady")
	n.mustRun("stop", "-t", "5", "steady")
	n.mustRun("start", "--checkpoint", "steady", "steady")
	n.mustRun("exec", "steady", "kill", "-TERM", "1")
	if !n.eventually(answerTimeout, func() bool { return begins() == 2 }) {
		n.Errorf("steady was restored and has ended, and has begun %d times, not twice", begins())
	}
	n.mustRun("rm", "-f", "steady")
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
	options, network := s.testbed.CNIOptions()
	return &nerdctl{command{
		scenario: s, program: program,
		options: append([]string{"--address", s.testbed.Address, "--namespace", testbed.Namespace, "--data-root", s.newDir()}, options...),
		env:     append(os.Environ(), "PATH="+s.testbed.Path),
	}, network}
}

// checkFails runs a command that fails with a word of why.
func (n *nerdctl) checkFails(why string, args ...string) {
	n.Helper()
	if out, err := n.tryRun(args...); err == nil || !strings.Contains(out, why) {
		n.Errorf("nerdctl %s: %v, which does not say %q\n%s", strings.Join(args, " "), err, why, out)
	}
}

// container makes one of the scenario's by `run` or `create`, and gives its id.
func (n *nerdctl) container(command, name string, more ...string) string {
	n.Helper()
	args := []string{command, "--name", name, "--runtime", testbed.Runtime, "--pull", "never"}
	id := n.mustRun(append(args, more...)...)
	n.adopt(id)
	n.step("nerdctl %s %s", command, name)
	return id
}

// checkCounter checks what nerdctl shows of the counter.
func (n *nerdctl) checkCounter(want string) {
	n.Helper()
	if have := n.mustRun("inspect", "--format", "{{.State.Status}} {{.State.ExitCode}}", "counter"); have != want {
		n.Errorf("nerdctl shows the counter as %q, not %q", have, want)
	}
}
