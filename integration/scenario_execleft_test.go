// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"strconv"
	"strings"
	"syscall"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// leftScript is a program for an exec to leave behind. It counts in a file of
// /tmp.
const leftScript = `i=0; while :; do i=$((i+1)); echo $i >/tmp/NAME.new; mv /tmp/NAME.new /tmp/NAME; sleep 0.1; done`

// execLeftovers: processes that an exec has left to the container's init come
// back. What has the terminal of an exec open is refused, and so is what the
// container has in common with an exec that still runs, by a sentence that names
// the process.
func execLeftovers(s *scenario) {
	c := s.create(counter("c"))
	run := s.run(c)
	s.waitNumbers(run.Output, workload.Ticks, 3)
	s.checkExecsRefused(run)
	left := []string{"background-1"}
	s.leave(run, left[0])
	before := s.leftCounts(run, left)
	for cycle := range 2 {
		dir := s.checkpoint(run, true)
		s.waitExit(run, 137)
		printed := s.printedNumbers(run.Output, workload.Ticks)
		run = s.restore(c, dir)
		s.checkConsecutive(printed[len(printed)-1]+1, s.waitNumbers(run.Output, workload.Ticks, 3))
		after := s.leftCounts(run, left)
		for i, name := range left {
			if after[i] <= before[i] {
				s.Errorf("%s has counted to %d, and to %d after the restore", name, before[i], after[i])
			}
		}
		if cycle == 0 { // to a restored container an exec comes in another way
			left = append(left, "background-2")
			s.leave(run, left[1])
			s.checkExecsRefused(run)
		}
		before = s.leftCounts(run, left)
	}
}

// leave has an exec leave a process behind.
func (s *scenario) leave(run *engine.Run, name string) {
	s.Helper()
	s.shell(run, "("+strings.ReplaceAll(leftScript, "NAME", name)+") >/dev/null 2>&1 & until [ -e /tmp/"+name+" ]; do sleep 0.1; done")
}

// leftCounts waits until each of the processes that were left behind has counted
// on, and returns the counts.
func (s *scenario) leftCounts(run *engine.Run, names []string) []int {
	s.Helper()
	counts := make([]int, len(names))
	for i, name := range names {
		read := func() int {
			n, err := strconv.Atoi(s.shell(run, "cat /tmp/"+name)[0])
			s.check(err)
			return n
		}
		first := read()
		if !s.eventually(caseTimeout, func() bool { counts[i] = read(); return counts[i] > first+2 }) {
			s.Errorf("%s does not count on from %d", name, first)
		}
	}
	return counts
}

// checkExecsRefused tries what cannot be checkpointed while an exec runs.
func (s *scenario) checkExecsRefused(run *engine.Run) {
	s.Helper()
	states := len(s.events.States(run.ID()))
	refused := func(what string, p *engine.Process, undo string, words ...string) {
		s.Helper()
		s.checkRefused(what, run, s.newDir(), append(words, "started by an exec", "once the exec has ended")...)
		s.check(p.Kill(s.ctx, syscall.SIGKILL))
		s.waitExecExit(p, 137)
		s.shell(run, undo+" >/dev/null 2>&1; true")
	}
	s.shell(run, workload.Path+" peer --listen >/tmp/server 2>&1 & until grep -q listening /tmp/server; do sleep 0.1; done")
	p := s.startExec(run, engine.Command{Args: []string{workload.Path, "peer"}})
	s.waitNumbers(p.Stdout, workload.Rounds, 2)
	refused("a client in an exec, over a unix socket", p, "rm /tmp/server", "workload (pid ", "unix socket that is connected to the process workload (pid ")

	s.shell(run, `exec >/dev/null 2>&1; sleep 1234 | nc -l -p 7000 & until cat /proc/net/tcp* | grep -q ":1B58 [^ ]* 0A "; do sleep 0.1; done`)
	p = s.startExec(run, engine.Command{Args: []string{"sh", "-c", "exec >/dev/null 2>&1 </dev/null; sleep 1234 | nc 127.0.0.1 7000"}})
	s.shell(run, `until cat /proc/net/tcp* | grep -q ":1B58 01 "; do sleep 0.1; done`)
	refused("a client in an exec, over TCP", p, "killall -9 nc sleep", "nc (pid ", "TCP connection from 127.0.0.1:7000 to", "to the process nc (pid ")

	keys := newTerminalInput()
	defer keys.Close()
	p = s.startExec(run, engine.Command{Args: []string{"sh", "-c", "(sleep 4321 & until grep -q sleep /proc/$!/comm; do sleep 0.1; done); echo ready; read line"}, Terminal: true, Stdin: keys})
	s.waitLine(p.Stdout, 0, "ready")
	refused("a process at the terminal of an exec", p, "kill $(pidof sleep)", "sleep (pid ", "attached to the exec's terminal")

	s.waitExecExit(s.startExec(run, engine.Command{Args: []string{"sh", "-c", "setsid sleep 1234 & until grep -q sleep /proc/$!/comm; do sleep 0.1; done"}, Terminal: true}), 0)
	s.checkRefused("a process at the terminal of an exec that has ended", run, s.newDir(), "sleep (pid ", "has the exec's terminal open", "input and output redirected")
	s.shell(run, "killall -9 sleep; true") // some of them have ended already
	s.checkCountsOn(run)
	if have := s.events.States(run.ID()); len(have) > states {
		s.Errorf("the container was %v", have[states:])
	}
}
