// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/kata-checkpoint/kata-checkpoint/integration/testbed"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
)

// guestStops is where the agent looks for the phases to stop at.
const guestStops = api.StateDir + "/stop"

// findAgent is a script that sets $agent to the agent's pid. It starts no
// process, which takes long in an emulated guest.
const findAgent = `agent=; for p in /proc/[0-9]*; do read n 2>/dev/null <$p/comm && [ "$n" = kata-checkpoint ] && agent=${p#/proc/} && break; done
[ -n "$agent" ] || { echo no agent; exit 1; }
`

// findCRIU sets $criu to the pid of the agent's CRIU, or of the launcher that
// becomes it or starts it, as soon as there is one. The files of children have no
// newline, which read takes for a failure.
const findCRIU = `criu=; while [ -z "$criu" ]; do for f in /proc/$agent/task/*/children; do
read criu rest 2>/dev/null <$f; [ -n "$criu" ] && read n 2>/dev/null </proc/$criu/comm && [ "$n" = criu-guard ] && read criu rest 2>/dev/null </proc/$criu/task/$criu/children
[ -n "$criu" ] && read n 2>/dev/null </proc/$criu/comm && [ "$n" = criu ] && break; criu=; done; done
`

// midway are conditions for CRIU to be in the middle of its work: it has
// written pages, or made a process.
var midway = map[string]string{
	"checkpoint": `until set -- /run/kata-checkpoint/exchange/*/checkpoint-*/pages-1.img; [ -s "$1" ]; do :; done
`,
	"restore": `until read l </proc/$criu/cgroup; case $l in */restored) true;; *) false;; esac; do :; done
until { read a; read b; } <"/sys/fs/cgroup${l#0::}/cgroup.procs"; do :; done
`,
}

// afterAnswer is a script that runs commands once the shell that has run it has
// ended, which it does when its answer has come. What they kill in the guest
// may end the VM: a restore that fails takes it away.
func afterAnswer(commands string) string {
	return "{ while [ -e /proc/$PPID/exe ]; do sleep 0.02; done; " + commands + "; } </dev/null >/dev/null 2>&1 &"
}

// shellInGuestOf runs a script in a sandbox's guest.
func (s *scenario) shellInGuestOf(id, script string) string {
	s.Helper()
	ctx, cancel := context.WithTimeout(s.ctx, paced(answerTimeout))
	defer cancel()
	out, status, err := s.testbed.GuestExec(ctx, id, script)
	if err != nil {
		s.Fatalf("in the guest: %s: %v", script, err)
	}
	if status != 0 {
		s.Fatalf("in the guest: %s: status %d: %s", script, status, out)
	}
	return strings.TrimSpace(string(out))
}

// stopFiles are the files by which the shims were told to stop.
func (k *killer) stopFiles() []string {
	k.Helper()
	found, err := filepath.Glob(filepath.Join(k.testbed.StopDir(), "*"))
	k.check(err)
	return found
}

// arm has an operation stop at a trial's point. The guest of a restore does not
// exist yet: it is told once it does.
func (k *killer) arm(t trial) {
	k.Helper()
	switch {
	case !t.guest:
		k.stopShimAt(t.operation + "-" + t.phase)
	case t.operation == "checkpoint":
		k.stopAgentAt(t)
	default:
		k.stopShimAt("restore-adopt")
	}
}

func (k *killer) stopShimAt(name string) {
	k.Helper()
	k.check(os.WriteFile(filepath.Join(k.testbed.StopDir(), name), nil, 0o600))
}

func (k *killer) stopAgentAt(t trial) {
	k.Helper()
	k.shellInGuestOf(k.c.ID(), fmt.Sprintf("mkdir -p %[1]s && : >%[1]s/%[2]s-%[3]s", guestStops, t.operation, t.phase))
}

// reach waits until the operation has stopped.
func (k *killer) reach(t trial, answer <-chan error) {
	k.Helper()
	name := t.operation + "-" + t.phase
	if t.guest && t.operation == "restore" {
		k.waitReached("restore-adopt", answer)
		k.stopAgentAt(t)
		k.check(os.Remove(filepath.Join(k.testbed.StopDir(), "restore-adopt.reached")))
	}
	if !t.guest {
		k.waitReached(name, answer)
		return
	}
	reached := guestStops + "/" + name + ".reached"
	script := fmt.Sprintf("until [ -e %s ]; do sleep 0.02; done\n", reached)
	if t.midway {
		script += findAgent + "rm " + reached + "\n" + findCRIU + midway[t.operation] + findCRIU + "kill -STOP $criu\n"
	}
	k.shellInGuestOf(k.c.ID(), script)
}

func (k *killer) waitReached(name string, answer <-chan error) {
	k.Helper()
	arrived := k.eventually(answerTimeout, func() bool {
		_, err := os.Lstat(filepath.Join(k.testbed.StopDir(), name+".reached"))
		return err == nil || len(answer) > 0
	})
	select {
	case err := <-answer:
		k.Fatalf("%s is not reached: the call was answered with %v", name, err)
	default:
	}
	if !arrived {
		k.Fatalf("%s is not reached", name)
	}
}

// kill kills the victim and lets the rest continue.
func (k *killer) kill(t trial) {
	k.Helper()
	switch t.victim {
	case "criu":
		k.shellInGuestOf(k.c.ID(), findAgent+findCRIU+afterAnswer("kill -9 $criu"))
	case "agent":
		script := findAgent
		switch kill := "kill -9 $agent"; {
		case t.midway:
			script += findCRIU + afterAnswer(kill+"; kill -CONT $criu")
		case t.guest:
			script += afterAnswer(kill + "; rm " + guestStops + "/*.reached")
		default:
			script += kill
		}
		k.shellInGuestOf(k.c.ID(), script)
	default:
		k.check(syscall.Kill(k.pid(t.victim), syscall.SIGKILL))
	}
	if !t.guest && t.victim != "shim" {
		k.release(t)
	}
}

// release has an operation continue that the shim has stopped.
func (k *killer) release(t trial) {
	k.Helper()
	err := os.Remove(filepath.Join(k.testbed.StopDir(), t.operation+"-"+t.phase+".reached"))
	if !errors.Is(err, fs.ErrNotExist) { // the operation has ended, and its stop
		k.check(err)
	}
}

// pid finds one of the container's processes on the host.
func (k *killer) pid(victim string) int {
	k.Helper()
	program := map[string]string{"shim": "containerd-shim-kata-checkpoint-v2", "kata": "containerd-shim-kata-v2", "vm": "qemu-system-x86_64"}[victim]
	pids, err := k.testbed.Pids(func(args []string) bool {
		return filepath.Base(args[0]) == program && strings.Contains(strings.Join(args, " "), k.c.ID())
	})
	k.check(err)
	if len(pids) != 1 {
		k.Fatalf("%s has the processes %v", program, pids)
	}
	return pids[0]
}

// sockets are those of the shim under test: its address, as containerd has it,
// and what else is named after it.
func (k *killer) sockets() []string {
	k.Helper()
	data, err := os.ReadFile(filepath.Join(k.testbed.Dir, "run/io.containerd.runtime.v2.task", testbed.Namespace, k.c.ID(), "bootstrap.json"))
	k.check(err)
	var bootstrap struct{ Address string }
	k.check(json.Unmarshal(data, &bootstrap))
	path := strings.TrimPrefix(bootstrap.Address, "unix://")
	found, err := filepath.Glob(path + "*")
	k.check(err)
	if len(found) == 0 {
		k.Fatalf("there is no socket %s", path)
	}
	return found
}

// verify reads a whole image set.
func verify(dir, scratch string) error {
	set, err := imageset.Open(dir)
	if err != nil {
		return err
	}
	defer set.Close()
	ctx, cancel := context.WithTimeout(context.Background(), paced(time.Minute))
	defer cancel()
	to := filepath.Join(scratch, "copy")
	if err := set.CopyTo(ctx, to, imageset.Limits{Files: 1 << 16, Bytes: 1 << 40}); err != nil {
		return err
	}
	return os.RemoveAll(to)
}
