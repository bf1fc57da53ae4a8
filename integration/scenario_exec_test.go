// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"fmt"
	"slices"
	"strings"
	"syscall"

	"github.com/containerd/cgroups/v3/cgroup1/stats"
	cgroup2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// lifecycleAfterRestore: whoever uses a restored container by exec, signals,
// output, statistics and exit statuses sees no difference.
func lifecycleAfterRestore(s *scenario) {
	c := s.create(engine.Container{ID: "c", Args: []string{workload.Path, "obedient"}})
	stderr := engine.NewOutput()
	first, err := s.engine.With(engine.Streams{Stderr: stderr}).Start(s.ctx, c)
	s.check(err)
	s.waitNumbers(first.Output, workload.Rounds, 3)
	view := s.execView(first)
	dir := s.checkpoint(first, true)
	s.waitExit(first, 137)
	before := s.printedNumbers(first.Output, workload.Rounds)
	errorsBefore := s.printedNumbers(stderr, workload.Rounds)

	// One that gets all execs, and then a SIGTERM, which the workload handles.
	// All are in the VM of one pod, next to each other.
	pod := s.startPod()
	c = pod.create(engine.Container{ID: "handles", Args: []string{workload.Path, "obedient"}})
	stderr = engine.NewOutput()
	restored, err := s.engine.With(engine.Streams{Stderr: stderr}).Restore(s.ctx, c, dir)
	s.check(err)
	s.step("restored")
	s.checkConsecutive(1, append(before, s.waitNumbers(restored.Output, workload.Rounds, 3)...))
	s.checkConsecutive(1, append(errorsBefore, s.waitNumbers(stderr, workload.Rounds, 3)...))
	s.checkStatus(restored, client.Running)
	s.checkStatistics(restored)
	if pids, err := restored.Pids(s.ctx); err != nil || len(pids) == 0 {
		s.Errorf("pids: %v, error %v", pids, err)
	}
	if have := s.execView(restored); !slices.Equal(have, view) {
		s.Errorf("an exec sees\n%s\nafter the restore, and before the checkpoint\n%s", strings.Join(have, "\n"), strings.Join(view, "\n"))
	}
	s.checkExecStreams(restored)
	s.step("streams of execs")
	s.checkExecIdentity(restored)
	s.step("identity of execs")
	s.checkExecNamespaces(restored)
	s.checkExecTerminal(restored)
	s.step("terminal of an exec")
	s.check(restored.Kill(s.ctx, syscall.SIGTERM))
	s.waitLine(restored.Output, 0, workload.TerminatedLine)
	s.waitExit(restored, workload.TerminatedStatus)
	s.checkExitEvents(c, workload.TerminatedStatus)

	// One that comes to ignore SIGTERM, which Kata then leaves alone (rpc.rs,
	// is_signal_handled).
	c = pod.create(engine.Container{ID: "ignores", Args: []string{workload.Path, "obedient"}})
	restored = s.restore(c, dir)
	s.sendCommand(restored, "ignore")
	s.waitLine(restored.Output, 0, workload.IgnoringLine)
	s.check(restored.Kill(s.ctx, syscall.SIGTERM))
	s.waitNumbers(restored.Output, workload.Rounds, len(s.printedNumbers(restored.Output, workload.Rounds))+3)
	s.check(restored.Kill(s.ctx, syscall.SIGKILL))
	s.waitExit(restored, 137)
	s.checkExitEvents(c, 137)

	c = pod.create(engine.Container{ID: "killed", Args: []string{workload.Path, "obedient"}})
	restored = s.restore(c, dir)
	s.waitNumbers(restored.Output, workload.Rounds, 1)
	s.check(restored.Kill(s.ctx, syscall.SIGKILL))
	status, err := restored.Exit(s.ctx)
	s.check(err)
	s.checkStatus(restored, client.Stopped)
	if status != 137 {
		s.Errorf("killed, and the status is %d", status)
	}
	_, err = restored.Delete(s.ctx)
	s.check(err)
	s.checkExitEvents(c, 137)

	c = pod.create(engine.Container{ID: "ends", Args: []string{workload.Path, "obedient"}})
	restored = s.restore(c, dir)
	s.sendCommand(restored, "exit 44")
	s.waitExit(restored, 44)
	s.checkExitEvents(c, 44)
}

// sendCommand gives a command to obedient.
func (s *scenario) sendCommand(run *engine.Run, command string) {
	s.Helper()
	s.shell(run, fmt.Sprintf("echo %s >/var/tmp/command.new && mv /var/tmp/command.new /var/tmp/command", command))
}

// execView gives what an exec sees of a container that no restore may change.
// No-new-privileges is not in it: Kata's Go shim loses it
// (src/runtime/virtcontainers/kata_agent.go, cmdToKataProcess), and an exec
// into a restored container has what was asked for.
func (s *scenario) execView(run *engine.Run) []string {
	s.Helper()
	lines := s.shell(run, `
		ps -o pid,user,args | grep -v -e ' ps ' -e ' sh ' -e ' grep ' -e ' tr ' | tr -s ' '
		echo limits $(tail -n +2 /proc/1/limits | md5sum)
		grep -e Cap -e Groups /proc/self/status
		echo oom $(cat /proc/self/oom_score_adj) of init $(cat /proc/1/oom_score_adj)
		awk '{print "mount", $5}' /proc/self/mountinfo
		echo descriptors $(ls /proc/self/fd | wc -l)
	`)
	slices.Sort(lines)
	return lines
}

// checkStatistics checks that containerd gets them, and that they are of the
// restored processes.
func (s *scenario) checkStatistics(run *engine.Run) {
	s.Helper()
	memory := func() (cpu, memory, pids uint64) {
		metric, err := run.Metrics(s.ctx)
		s.check(err)
		data, err := typeurl.UnmarshalAny(metric.Data)
		s.check(err)
		switch m := data.(type) {
		case *stats.Metrics:
			return m.GetCPU().GetUsage().GetTotal(), m.GetMemory().GetUsage().GetUsage(), m.GetPids().GetCurrent()
		case *cgroup2.Metrics:
			return m.GetCPU().GetUsageUsec(), m.GetMemory().GetUsage(), m.GetPids().GetCurrent()
		}
		s.Fatalf("statistics are a %T", data)
		return 0, 0, 0
	}
	cpu, used, pids := memory()
	if used < 1<<20 || pids < 2 {
		s.Errorf("statistics: %d bytes of memory, %d processes", used, pids)
	}
	for {
		if now, _, _ := memory(); now > cpu {
			return
		}
		if s.ctx.Err() != nil {
			s.Fatalf("statistics: the processor time stays at %d", cpu)
		}
	}
}

// checkExecStreams checks exit statuses, signals, stdin, stdout and stderr of
// execs.
func (s *scenario) checkExecStreams(run *engine.Run) {
	s.Helper()
	p := s.startExec(run, engine.Command{Args: []string{"sh", "-c", "echo out; echo err >&2; exit 7"}})
	s.waitExecExit(p, 7)
	s.checkOutput("stdout", p.Stdout, "out")
	s.checkOutput("stderr", p.Stderr, "err")

	p = s.startExec(run, engine.Command{Args: []string{"cat"}, Stdin: strings.NewReader("one\ntwo\n")})
	s.waitExecExit(p, 0)
	s.checkOutput("cat", p.Stdout, "one", "two")

	p = s.startExec(run, engine.Command{Args: []string{"sh", "-c", "kill -9 $$"}})
	s.waitExecExit(p, 137)

	p = s.startExec(run, engine.Command{Args: []string{"sh", "-c", `trap "exit 9" TERM; echo ready; while :; do sleep 0.05; done`}})
	s.waitLine(p.Stdout, 0, "ready")
	s.check(p.Kill(s.ctx, syscall.SIGTERM))
	s.waitExecExit(p, 9)

	p = s.startExec(run, engine.Command{Args: []string{"sh", "-c", `echo $$; exec sleep 1000`}})
	s.check(p.Stdout.Wait(s.ctx, func(lines []string) (bool, error) { return len(lines) == 1, nil }))
	pid := p.Stdout.Lines()[0]
	s.check(p.Kill(s.ctx, syscall.SIGKILL))
	s.waitExecExit(p, 137)
	s.shell(run, "while [ -e /proc/"+pid+" ]; do sleep 0.05; done") // ended, and reaped

	p, err := s.engine.Add(s.ctx, run, engine.Command{ID: "no-such-program", Args: []string{"/no/such/program"}})
	s.check(err)
	if err := p.Start(s.ctx); err == nil {
		s.Error("a program that does not exist was started")
	} else if !strings.Contains(err.Error(), "not found") {
		s.Errorf("the start of a program that does not exist: %v", err)
	}
	_, err = p.Delete(s.ctx, client.WithProcessKill)
	s.check(err)
}

// checkExecIdentity checks all that an exec's caller can say of its process.
func (s *scenario) checkExecIdentity(run *engine.Run) {
	s.Helper()
	p := s.startExec(run, engine.Command{
		Args: []string{"sh", "-c", `
			echo user $(id -u) group $(id -g) groups $(id -G)
			echo cwd $(pwd) env $GREETING
			echo files $(ulimit -n)
			grep -e CapInh -e CapPrm -e CapEff -e CapBnd -e CapAmb -e NoNewPrivs /proc/self/status`},
		Change: func(p *specs.Process) {
			p.User = specs.User{UID: 1000, GID: 1000, AdditionalGids: []uint32{2000}}
			p.Cwd = "/home/user"
			p.Env = append(slices.Clone(p.Env), "GREETING=hello there")
			p.NoNewPrivileges = true
			p.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 123, Hard: 321}}
			one := []string{"CAP_CHOWN"} // capability number 0
			p.Capabilities = &specs.LinuxCapabilities{Bounding: []string{"CAP_CHOWN", "CAP_KILL"}, Effective: one, Permitted: one, Inheritable: one, Ambient: one}
		},
	})
	s.waitExecExit(p, 0)
	s.checkOutput("identity", p.Stdout, "user 1000 group 1000 groups 1000 2000", "cwd /home/user env hello there", "files 123",
		"CapInh:\t0000000000000001", "CapPrm:\t0000000000000001", "CapEff:\t0000000000000001", "CapBnd:\t0000000000000021",
		"CapAmb:\t0000000000000001", "NoNewPrivs:\t1")
}

// checkExecNamespaces checks that an exec is in the workload's own namespaces,
// and not in those that Kata knows.
func (s *scenario) checkExecNamespaces(run *engine.Run) {
	s.Helper()
	for _, line := range s.shell(run, `cd /proc/1/ns; for n in cgroup ipc mnt net pid time user uts; do echo $n $(readlink $n) $(readlink /proc/self/ns/$n); done`) {
		if f := strings.Fields(line); len(f) != 3 || f[1] != f[2] {
			s.Errorf("an exec's namespaces: %q", line)
		}
	}
	// Each container sees its own cgroup as the root, restored or not.
	if have := s.shell(run, "cat /proc/1/cgroup /proc/self/cgroup | sort -u"); !slices.Equal(have, []string{"0::/"}) {
		s.Errorf("an exec and init are in the cgroups %q", have)
	}
	if have := s.shell(run, "tr '\\0' ' ' </proc/1/cmdline"); !slices.Equal(have, []string{workload.Path + " obedient "}) {
		s.Errorf("an exec's process 1 is %q", have)
	}
}

// checkExecTerminal checks a terminal: its size, that it is the controlling
// one, and what is typed.
func (s *scenario) checkExecTerminal(run *engine.Run) {
	s.Helper()
	keyboard := newTerminalInput()
	defer keyboard.Close()
	p := s.startExec(run, engine.Command{
		Args: []string{"sh", "-c", "echo ready >/dev/tty; read line; echo line $line; stty size; exit 5"}, Terminal: true, Stdin: keyboard,
	})
	s.waitLine(p.Stdout, 0, "ready")
	s.check(p.Resize(s.ctx, 132, 43))
	keyboard.send("hello\n")
	s.waitLine(p.Stdout, 0, "line hello")
	s.waitLine(p.Stdout, 0, "43 132")
	s.waitExecExit(p, 5)
}
