// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"fmt"
	"testing"

	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
)

// mountsCase is a privileged container whose program changes the container's own
// mounts.
type mountsCase struct {
	name string
	// setup runs once, and check in every round.
	setup, check string
	// then runs in the restored container, and prints what is wanted.
	then, want string
	// refused are words of a refusal, for what cannot come back.
	refused []string
}

var mountsCases = []mountsCase{
	{
		name:  "root made shared",
		setup: "mount --make-rshared / && mkdir /run/x && mount -t tmpfs t /run/x && echo here >/run/x/f",
		check: `grep -q ' / / [^-]*shared:' /proc/self/mountinfo && [ "$(cat /run/x/f)" = here ]`,
		then:  "cat /run/x/f", want: "here",
	},
	{
		name:  "namespace made a slave",
		setup: "mount --make-rshared / && mkdir /run/x && { unshare -m --propagation slave sleep 4321 & slave=$!; } && until grep -q sleep /proc/$slave/comm; do sleep 0.1; done",
		check: "mount -t tmpfs t /run/x && grep -q ' /run/x ' /proc/$slave/mounts && umount /run/x && ! grep -q ' /run/x ' /proc/$slave/mounts",
		// What a slave mounts is not seen by its master.
		then: "for p in /proc/[0-9]*; do [ \"$(tr '\\0' ' ' <$p/cmdline)\" = 'sleep 4321 ' ] && slave=$p; done 2>/dev/null; mkdir -p /run/y && nsenter -t ${slave#/proc/} -m mount -t tmpfs t /run/y && grep -q ' /run/y ' $slave/mounts && { grep -c ' /run/y ' /proc/self/mounts || true; }", want: "0",
	},
	{
		name:  "/run covered",
		setup: "echo lower >/run/f && mount -t tmpfs t /run && echo upper >/run/f",
		check: `[ "$(cat /run/f)" = upper ] && [ "$(grep -c ' /run ' /proc/self/mounts)" = 2 ]`,
		then:  "umount /run && cat /run/f && mount -t tmpfs t /run && echo upper >/run/f", want: "lower",
	},
	{
		name:  "/proc covered by another one",
		setup: "mount -t proc p /proc",
		check: "[ \"$(grep -c ' /proc ' /proc/self/mounts)\" = 2 ] && [ -e /proc/$$/comm ]",
		then:  "cat /proc/1/comm", want: "sh",
	},
	{
		name:    "/proc covered by something else",
		setup:   "mount -t tmpfs t /proc",
		check:   "[ ! -e /proc/1 ]",
		refused: []string{"unmounted, moved or covered its /proc", "mount a proc file system there"},
	},
	{
		name: "root changed by pivot_root",
		setup: "mount --make-rprivate / && mkdir /new && mount -t tmpfs n /new && cp -a /bin /new/ && mkdir /new/old /new/proc && cd /new && pivot_root . old && " +
			"mount -t proc p /proc && umount -l /old && echo new >/f",
		check:   `[ "$(cat /f)" = new ] && [ ! -e /old/bin ]`,
		refused: []string{"has covered, moved or unmounted its /dev/shm"},
	},
	{
		name:    "root changed by pivot_root, and the old one kept",
		setup:   "mount --make-rprivate / && mkdir /new && mount -t tmpfs n /new && cp -a /bin /new/ && mkdir /new/old /new/proc && cd /new && pivot_root . old && mount -t proc p /proc && echo new >/f",
		check:   `[ "$(cat /f)" = new ] && [ -e /old/bin ]`,
		refused: []string{"moved"},
	},
}

// mountsChanged: what a workload does to the mounts of its container, propagation
// and root included, comes back twice, or is refused before anything is frozen.
func mountsChanged(s *scenario) {
	pod := s.startPod()
	for i, c := range mountsCases {
		s.Run(c.name, func(t *testing.T) { s.sub(t).checkMounts(pod, fmt.Sprintf("mounts-%d", i), c) })
	}
}

func (s *scenario) checkMounts(pod *pod, id string, c mountsCase) {
	program := caseProgram{args: c.name}
	script := fmt.Sprintf("%s || { echo '%[3]s: SETUP'; exit 2; }; i=0; while :; do i=$((i+1)); if %[2]s; then echo \"%[3]s: round $i\"; else echo '%[3]s: FAIL'; fi; sleep 1; done", c.setup, c.check, c.name)
	container := engine.Container{ID: id, Args: []string{"sh", "-c", script}, Mounts: []specs.Mount{bind(s.newDir(), "/data", "rw")}, Spec: []oci.SpecOpts{oci.WithPrivileged}}
	created := pod.create(container)
	run := s.run(created)
	s.waitRounds(run, []caseProgram{program})
	if c.refused != nil {
		s.checkRefused(c.name, run, s.newDir(), c.refused...)
		if states := s.events.States(run.ID()); len(states) > 0 {
			s.Errorf("the container was %v", states)
		}
		rounds, _ := program.parse(run.Output.Lines())
		if !s.eventually(caseTimeout, func() bool {
			now, failures := program.parse(run.Output.Lines())
			return len(now) > len(rounds)+2 && len(failures) == 0
		}) {
			s.Errorf("after the refusal there is %q", run.Output.Lines())
		}
		s.remove(created)
		return
	}
	runs := []*engine.Run{run}
	for cycle := range 2 {
		dir := s.checkpoint(run, true)
		s.waitExit(run, 137)
		s.remove(created)
		container.ID = fmt.Sprintf("%s-%d", id, cycle)
		created = pod.create(container)
		run = s.restore(created, dir)
		runs = append(runs, run)
		s.waitRounds(run, []caseProgram{program})
	}
	program.checkRuns(s.T, runs)
	if have := s.shell(run, c.then); c.want != "" && (len(have) != 1 || have[0] != c.want) {
		s.Errorf("%s: in %s there is %q, not %q", c.name, created.ID(), have, c.want)
	}
	s.remove(created) // the next one has the VM for itself
}
