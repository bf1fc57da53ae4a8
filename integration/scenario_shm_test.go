// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/client"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// podShmTwoRestores: two containers of a pod, checkpointed at one instant, have
// one file of /dev/shm in common, and files of their own. Restored one after
// the other in a new pod, they have them again; what was in the new pod's
// /dev/shm before is still there, as it was.
func podShmTwoRestores(s *scenario) {
	slots := func(id string, slot int) engine.Container {
		return engine.Container{ID: id, Args: []string{workload.Path, "slots", "--slot", fmt.Sprint(slot), "--own", fmt.Sprintf("/dev/shm/own-%d", slot)}}
	}
	pod := s.startPodNamed("from")
	c, d := pod.create(slots("a", 0)), pod.create(slots("b", 1))
	a, b := s.run(c), s.run(d)
	s.shell(a, "cd /dev/shm; echo of the old pod >note; echo of the old pod >left; mkdir dir; echo of the old pod >dir/file; ln -s left link")
	s.waitNumbers(a.Output, workload.Rounds, 5)
	s.waitNumbers(b.Output, workload.Rounds, 5)
	// At one instant, as they share a file.
	s.check(a.Pause(s.ctx))
	s.check(b.Pause(s.ctx))
	dirA, dirB := s.checkpoint(a, false), s.checkpoint(b, false)
	atA, atB := s.printedNumbers(a.Output, workload.Rounds), s.printedNumbers(b.Output, workload.Rounds)
	s.check(b.Resume(s.ctx))
	s.check(a.Resume(s.ctx))
	s.checkConsecutive(1, s.waitNumbers(a.Output, workload.Rounds, len(atA)+3))
	s.checkConsecutive(1, s.waitNumbers(b.Output, workload.Rounds, len(atB)+3))
	for _, c := range []client.Container{c, d, pod.sandbox} {
		s.remove(c)
	}

	pod = s.startPodNamed("to")
	other := s.run(pod.create(engine.Container{ID: "other", Args: []string{workload.Path, "idle"}}))
	s.shell(other, "cd /dev/shm; printf new >note; mkdir dir; echo of the new pod >dir/new")
	c = pod.create(slots("c", 0))
	restoredA := s.restore(c, dirA)
	// It lost nothing, and continued where it was: what it printed before its
	// last number was printed before, too.
	s.checkContinuesAfter(restoredA, len(atA))
	s.checkShm(other, "dir/file of the old pod", "dir/new of the new pod", "left of the old pod", "link of the old pod", "note new")
	at := len(s.printedNumbers(restoredA.Output, workload.Rounds))
	restoredB := s.restore(pod.create(slots("d", 1)), dirB)
	s.checkContinuesAfter(restoredB, len(atB))
	s.waitNumbers(restoredA.Output, workload.Rounds, at+5)
	s.checkOtherVM(a, restoredA)
	s.checkShm(other, "dir/file of the old pod", "dir/new of the new pod", "left of the old pod", "link of the old pod", "note new")
	s.step("both are restored")

	// Without one of them, which has left its files in the pod.
	s.remove(c)
	s.shell(other, "cd /dev/shm; echo more >>own-0; head -c 4096 /dev/zero >>slots; rm left link")
	c = pod.create(slots("refused", 0))
	_, err := s.engine.Restore(s.ctx, c, dirA)
	if err == nil {
		s.Error("restored on files that are not its own")
	} else {
		s.Logf("refused: %v", err)
		for _, word := range []string{"/dev/shm/own-0 (has 21 bytes, had 16)", "/dev/shm/slots (has 8192 bytes, had 4096)", "pod's /dev/shm", "another pod"} {
			if !strings.Contains(err.Error(), word) {
				s.Errorf("the refusal does not say %q: %v", word, err)
			}
		}
	}
	s.checkShm(other, "dir/file of the old pod", "dir/new of the new pod", "note new") // nothing was brought
	at = len(s.printedNumbers(restoredB.Output, workload.Rounds))
	s.waitNumbers(restoredB.Output, workload.Rounds, at+3)
	s.remove(c)
}

// checkShm checks the small files of a pod's /dev/shm: name and content a line.
// Those of the workloads are left out.
func (s *scenario) checkShm(run *engine.Run, want ...string) {
	s.Helper()
	have := s.shell(run, `cd /dev/shm; find . -type f -o -type l | while read f; do case $f in ./own-*|./slots) ;; *) echo ${f#./} $(cat $f);; esac; done`)
	slices.Sort(have)
	if !slices.Equal(have, want) {
		s.Errorf("in /dev/shm there are %q, not %q", have, want)
	}
}
