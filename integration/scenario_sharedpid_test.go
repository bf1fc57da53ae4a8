// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"syscall"

	runcoptions "github.com/containerd/containerd/api/types/runc/options"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// podSharedPID: of the containers that share their pod's pid namespace one is
// checkpointed while all keep running. Restored in another pod it has a pid
// namespace of its own, in which its processes have their pids, and is a
// container as any other: it can be checkpointed, and restored, again.
func podSharedPID(s *scenario) {
	obedient := func(id string) engine.Container {
		return engine.Container{ID: id, Args: []string{workload.Path, "obedient"}}
	}
	pod := s.startPodNamed("from")
	o := pod.create(pod.withPodPIDs(engine.Container{ID: "other", Args: []string{workload.Path, "counter", "--shm", "/dev/shm/other"}}))
	other := s.run(o)
	c := pod.create(pod.withPodPIDs(obedient("c")))
	first := s.run(c)
	s.waitNumbers(other.Output, workload.Ticks, 3)
	before := s.waitNumbers(first.Output, workload.Rounds, 3)
	pid := s.pidsOf(first, "obedient")[0]
	if pid == 1 || len(s.pidsOf(first, "counter")) != 1 {
		s.Fatalf("the pid namespace is not shared: the workload's pid is %d, and the other's are %v", pid, s.pidsOf(first, "counter"))
	}
	p := s.startExec(first, engine.Command{Args: []string{"sh", "-c", `i=0; while :; do i=$((i+1)); echo round $i; sleep 0.1; done`}})
	s.waitNumbers(p.Stdout, workload.Rounds, 2)
	at := len(s.printedNumbers(other.Output, workload.Ticks))
	dir := s.checkpoint(first, false)
	last := s.printedNumbers(first.Output, workload.Rounds)
	s.checkConsecutive(1, s.waitNumbers(other.Output, workload.Ticks, at+5))
	s.checkConsecutive(1, s.waitNumbers(first.Output, workload.Rounds, len(last)+5))
	s.checkConsecutive(1, s.waitNumbers(p.Stdout, workload.Rounds, len(s.printedNumbers(p.Stdout, workload.Rounds))+3))
	s.remove(c)
	at = len(s.printedNumbers(other.Output, workload.Ticks))
	s.checkConsecutive(1, s.waitNumbers(other.Output, workload.Ticks, at+3))
	s.step("all went on, and the rest still does")
	s.remove(o)
	s.remove(pod.sandbox)

	// Into a pod that shares its pid namespace, too.
	pod = s.startPodNamed("to")
	restored := s.restore(pod.create(pod.withPodPIDs(obedient("restored"))), dir)
	after := s.waitNumbers(restored.Output, workload.Rounds, 3)
	if n := after[0] - 1; n < len(before) || n > len(last) {
		s.Errorf("it continues after %d; at the checkpoint it was between %d and %d", n, len(before), len(last))
	}
	s.checkConsecutive(after[0], after)
	s.checkOtherVM(first, restored)
	s.checkOwnPIDNamespace(restored, pid)
	s.waitExecExit(s.startExec(restored, engine.Command{Args: []string{"sh", "-c", "exit 7"}}), 7)
	// What has lost its parent there has no place in the next checkpoint, and
	// leaves nothing once it has ended.
	stray := s.shell(restored, "(sleep 1000 </dev/null >/dev/null 2>&1 & echo $!)")[0]
	s.checkRefused("a process that has strayed", restored, s.newDir(), "sleep (pid", "lost its parent")
	s.shell(restored, fmt.Sprintf("kill -9 %s; while [ -e /proc/%s ]; do sleep 0.05; done", stray, stray))
	s.step("execs")

	dir = s.checkpoint(restored, true)
	s.waitExit(restored, 137)
	after = s.printedNumbers(restored.Output, workload.Rounds)
	again := s.restore(pod.create(obedient("again")), dir)
	s.checkConsecutive(after[0], append(after, s.waitNumbers(again.Output, workload.Rounds, 3)...))
	s.checkOwnPIDNamespace(again, pid)
	s.check(again.Kill(s.ctx, syscall.SIGTERM))
	s.waitLine(again.Output, 0, workload.TerminatedLine)
	s.waitExit(again, workload.TerminatedStatus)

	ends := s.restore(pod.create(pod.withPodPIDs(obedient("ends"))), dir)
	s.sendCommand(ends, "exit 44")
	s.waitExit(ends, 44)
	killed := s.restore(pod.create(obedient("killed")), dir)
	s.waitNumbers(killed.Output, workload.Rounds, 1)
	s.check(killed.Kill(s.ctx, syscall.SIGKILL))
	s.waitExit(killed, 137)

	// Many processes, of which some have the pids that CRIU would have had.
	crowd := pod.create(pod.withPodPIDs(engine.Container{
		ID: "crowd", Args: []string{"sh", "-c", "for i in $(seq 12); do sleep 100000 & done; exec " + workload.Path + " counter"},
	}))
	many := s.run(crowd)
	s.waitNumbers(many.Output, workload.Ticks, 3)
	dir = s.newDir()
	s.check(s.engine.CheckpointWith(s.ctx, many, dir, &runcoptions.CheckpointOptions{Exit: true}))
	s.waitExit(many, 137)
	counted := s.printedNumbers(many.Output, workload.Ticks)
	s.checkConsecutive(1, append(counted, s.waitNumbers(s.restore(crowd, dir).Output, workload.Ticks, 5)...))
	s.remove(crowd)

	// A tree, with sessions, groups and threads.
	c = pod.create(pod.withPodPIDs(engine.Container{ID: "tree", Args: []string{workload.Path, "tree"}}))
	tree := s.run(c)
	s.waitNumbers(tree.Output, workload.Rounds, 3)
	dir = s.newDir()
	s.check(s.engine.CheckpointWith(s.ctx, tree, dir, &runcoptions.CheckpointOptions{Exit: true, FileLocks: true}))
	s.waitExit(tree, 137)
	after = s.printedNumbers(tree.Output, workload.Rounds)
	s.checkConsecutive(1, append(after, s.waitNumbers(s.restore(c, dir).Output, workload.Rounds, 5)...))
}

// pidsOf gives the pids of a program of the workload's, as an exec in the
// container sees them.
func (s *scenario) pidsOf(run *engine.Run, program string) []int {
	s.Helper()
	var out []int
	for _, line := range s.shell(run, `cd /proc; for p in [0-9]*; do echo $p $(tr '\0' ' ' <$p/cmdline); done 2>/dev/null; true`) {
		fields := strings.Fields(line)
		if len(fields) > 2 && slices.Contains(fields[1:], workload.Path) && slices.Contains(fields, program) {
			pid, err := strconv.Atoi(fields[0])
			s.check(err)
			out = append(out, pid)
		}
	}
	return out
}

// checkOwnPIDNamespace checks that a restored container has a pid namespace of
// its own, in which its init has a pid and no other container's is.
func (s *scenario) checkOwnPIDNamespace(run *engine.Run, pid int) {
	s.Helper()
	if have := s.pidsOf(run, "obedient"); !slices.Equal(have, []int{pid}) {
		s.Errorf("the workload's pids are %v, and before the checkpoint it had %d", have, pid)
	}
	for _, line := range s.shell(run, "ps -o pid,args | tail -n +2") {
		fields := strings.Fields(line)
		own := slices.Contains(fields, "obedient") || slices.Contains(fields, "ps") || slices.Contains(fields, "tail") || slices.Contains(fields, "sh")
		if init := fields[0] == "1" && slices.Equal(fields[1:], []string{"kata-checkpoint-helper", "init"}); !own && !init {
			s.Errorf("ps shows %q", line)
		}
	}
}
