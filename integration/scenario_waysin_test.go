// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"fmt"
	"strings"
	"syscall"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
)

// consolePort is the vsock port of a debug console, which serves whoever
// connects.
const consolePort = 1026

// plant puts a program of the container's in the exec helper's place, by all
// that root in a container might do.
const plant = `
	printf '#!/bin/sh\ntouch /run/stolen /tmp/stolen /var/tmp/stolen\nexec /bin/sleep 1000\n' >/var/tmp/thief
	chmod 755 /var/tmp/thief
	cp /var/tmp/thief /dev/.kata-checkpoint && echo planted
	mount --bind /var/tmp/thief /dev/.kata-checkpoint 2>&1
	mount -t tmpfs none /dev 2>&1
	for up in . .. ../.. ../../..; do echo 0 >/sys/fs/cgroup/$up/cgroup.procs; done 2>&1
	true`

// waysIn: root in a container, a restored one too, tries to get at what works
// in the guest on its behalf, in the ways that docs/security.md lists, and gets
// nothing. The engine's calls keep working meanwhile.
func waysIn(s *scenario) {
	c := s.create(engine.Container{ID: "c", Args: []string{workload.Path, "intruder"}})
	first := s.run(c)
	s.waitNumbers(first.Output, workload.Rounds, 3)
	s.checkAgentUnreachable(first)
	s.step("vsock")
	s.shell(first, plant)
	dir := s.checkpoint(first, true)
	s.waitExit(first, 137)
	before := s.printedNumbers(first.Output, workload.Rounds)
	s.remove(c)

	pod := s.startPod()
	c = pod.create(engine.Container{ID: "restored", Args: []string{workload.Path, "intruder"}})
	restored := s.restore(c, dir)
	s.checkConsecutive(1, append(before, s.waitNumbers(restored.Output, workload.Rounds, 3)...))
	s.checkAgentUnreachable(restored)
	s.step("vsock, from a restored container")

	// What was planted before the checkpoint is in the image set. It is planted
	// again, over whatever came in its place.
	s.checkExecsGenuine(restored, pod)
	if have := s.shell(restored, plant); len(have) == 0 || have[0] != "planted" {
		s.Errorf("nothing was planted, and so nothing is tried: %q", have)
	}
	s.checkExecsGenuine(restored, pod)
	s.step("the helper's place")

	// An exec's process is the agent's helper until it becomes the command.
	spy := s.startExec(restored, engine.Command{Args: []string{workload.Path, "spy"}})
	s.waitLine(spy.Stdout, 0, workload.SpyingLine)
	for range 10 {
		s.shell(restored, "true")
	}
	s.check(spy.Kill(s.ctx, syscall.SIGKILL))
	s.waitExecExit(spy, 137)
	for _, line := range spy.Stdout.Lines()[1:] {
		s.Error(line)
	}
	s.step("a spy")

	// Descriptors can be sent to whom one can connect to: the agent has no
	// socket that has a name.
	if have := s.shellInGuest(pod, `
		for pid in $(cat /sys/fs/cgroup/cgroup.procs); do
			readlink /proc/$pid/exe | grep -q kata-checkpoint-agent || continue
			echo agent
			for fd in /proc/$pid/fd/*; do
				inode=$(readlink $fd | sed -n 's/^socket:\[\(.*\)\]$/\1/p')
				[ -z "$inode" ] || awk -v inode=$inode '$7 == inode && NF > 7 {print "socket", $8}' /proc/net/unix
			done
		done | sort -u`); have != "agent" {
		s.Errorf("the agent can be sent descriptors: %q", have)
	}
	// No poser got anything: the intruder would have ended.
	after := len(s.printedNumbers(restored.Output, workload.Rounds))
	s.checkConsecutive(1, append(before, s.waitNumbers(restored.Output, workload.Rounds, after+3)...))
}

// checkAgentUnreachable has a container call the agent in its guest.
func (s *scenario) checkAgentUnreachable(run *engine.Run) {
	s.Helper()
	dial := func(port int) []string {
		return s.shell(run, fmt.Sprintf("%s dial-agent --port %d", workload.Path, port))
	}
	// There is a way: a service of the guest that serves everybody is reached
	// by the loopback. It understands nothing of what it is sent.
	if have := dial(consolePort); !strings.HasPrefix(have[0], fmt.Sprintf("%s 1:%d connected", workload.DialedLine, consolePort)) {
		s.Errorf("the guest's own services are not reached: %q", have)
	}
	lines := dial(api.DefaultPort)
	if len(lines) != 5 {
		s.Errorf("tried %q", lines)
	}
	for _, line := range lines {
		s.Log(line)
		if !strings.Contains(line, "refused: ") {
			s.Error(line)
		}
	}
}

// checkExecsGenuine checks that an exec runs what it is asked to, in the
// container, and that nothing else came to run in its place.
func (s *scenario) checkExecsGenuine(run *engine.Run, p *pod) {
	s.Helper()
	exec := s.startExec(run, engine.Command{Args: []string{"sh", "-c", "echo true; exit 3"}})
	s.waitExecExit(exec, 3)
	s.checkOutput("exec", exec.Stdout, "true")
	if have := s.shellInGuest(p, "find / -xdev -name stolen 2>/dev/null; true"); have != "" {
		s.Errorf("outside of the container there is %q", have)
	}
	if have := s.shell(run, "ls /run/stolen /tmp/stolen /var/tmp/stolen 2>/dev/null; true"); len(have) > 0 {
		s.Errorf("the program in the helper's place has run: %q", have)
	}
}
