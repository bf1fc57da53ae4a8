// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/client"

	"github.com/kata-checkpoint/kata-checkpoint/integration/testbed"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// cycles is how many times a container is checkpointed and restored. What the
// first leaves may be there for good; what every one leaves shows.
const cycles = 3

// threeCycles: a container that is checkpointed and restored again and again,
// each time in a new VM, keeps counting. Nothing is more, on the machine or
// in its guest, after the last restore than after the first.
func threeCycles(s *scenario) {
	c := s.create(counter("c"))
	run := s.run(c)
	s.waitNumbers(run.Output, workload.Ticks, 5)
	first := run
	var numbers []int
	ended := inventoryComparison{when: "after a checkpoint that ended the container", list: s.hostInventory}
	restored := inventoryComparison{when: "after a restore", list: func() []string { return append(s.hostInventory(), s.guestInventory(c)...) }}
	for i := range cycles {
		dir := s.checkpoint(run, true)
		s.waitExit(run, 137)
		numbers = append(numbers, s.printedNumbers(run.Output, workload.Ticks)...)
		ended.compare(s, i, 0, cycles-1)

		run = s.restore(c, dir)
		s.checkConsecutive(1, append(slices.Clone(numbers), s.waitNumbers(run.Output, workload.Ticks, 5)...))
		restored.compare(s, i, 0, cycles-1)
	}
	s.checkExitEvents(c, slices.Repeat([]uint32{137}, cycles)...)
	s.checkOtherVM(first, run)
	s.remove(c)
}

// fiftyCycles: a container of a pod that is checkpointed and restored fifty
// times in the same VM keeps counting. What lives as long as the pod, the
// shim and the agent, needs no more memory, threads or anything else for the
// last ten times than for the ten before, and neither the image set nor the
// time grows. Those before are for what is there for good once it is needed:
// caches, a heap of the size that it works with.
func fiftyCycles(s *scenario) {
	const tenth, all = 10, 50
	pod := s.startPod()
	// A huge page that the kernel gives to a restored heap is in the next image
	// set as a whole, be it ever so empty.
	s.shellInGuestOf(pod.sandbox.ID(), "echo never >/sys/kernel/mm/transparent_hugepage/enabled")
	counting := counter("c")
	// Whether virtiofsd has the directory of its file open depends on the
	// moment, where that is in the root file system. How much of a heap is in
	// use, and so in the image set, does, too.
	counting.Args = append(counting.Args, "--file", "/dev/shm/file-count", "--lean")
	c := pod.create(counting)
	run := s.run(c)
	var numbers []int
	restored := inventoryComparison{when: "after a restore", list: func() []string {
		// What the guest has in its caches of files that are gone, virtiofsd
		// keeps open for it: of a container's root file system as of its
		// exchange.
		s.shellInGuestOf(pod.sandbox.ID(), "echo 3 >/proc/sys/vm/drop_caches")
		return append(s.hostInventory(), s.guestInventory(pod.sandbox)...)
	}}
	drifts := series{}
	for i := range all {
		s.waitNumbers(run.Output, workload.Ticks, 2)
		dir, begin := s.newDir(), time.Now()
		s.check(s.engine.CheckpointTo(s.ctx, run, dir, true))
		drifts.add(checkpointTime, int(time.Since(begin).Milliseconds()))
		drifts.add("image set, in KiB", s.size(dir)>>10)
		s.waitExit(run, 137)
		numbers = append(numbers, s.printedNumbers(run.Output, workload.Ticks)...)

		begin = time.Now()
		var err error
		run, err = s.engine.Restore(s.ctx, c, dir)
		s.check(err)
		drifts.add(restoreTime, int(time.Since(begin).Milliseconds()))
		// Long enough for the shim to be at rest again.
		s.checkConsecutive(1, append(slices.Clone(numbers), s.waitNumbers(run.Output, workload.Ticks, 8)...))
		for what, n := range s.shimNeeds() {
			drifts.add("shim: "+what, n)
		}
		for what, n := range s.agentNeeds(pod.sandbox.ID()) {
			drifts.add("agent: "+what, n)
		}
		if i%tenth == tenth-1 {
			s.step("%d times checkpointed and restored", i+1)
		}
		restored.compare(s, i, tenth-1, all-1)
	}
	drifts.check(s, tenth)
	s.checkExitEvents(c, slices.Repeat([]uint32{137}, all)...)
}

// series has a number of each cycle, by what it counts.
type series map[string][]int

const (
	checkpointTime = "checkpoint, in ms"
	restoreTime    = "restore, in ms"
	threads        = "threads"
)

func (d series) add(what string, n int) { d[what] = append(d[what], n) }

// check compares the last numbers, so many, with those before them: the
// smallest of each, for which chance and the machine's other work count least.
// Drift continues, from the first half of the last to the second as well; a
// step that is taken once, as Go's heap takes some, is none.
func (d series) check(s *scenario, last int) {
	s.Helper()
	for _, what := range slices.Sorted(maps.Keys(d)) {
		n := d[what]
		before, after := slices.Min(n[len(n)-2*last:len(n)-last]), slices.Min(n[len(n)-last:])
		s.Logf("%s: at least %d in the %d cycles before the last %d, and %d in these; all: %v", what, before, last, last, after, n)
		// A page of memory for each cycle is more than that. How fast the
		// machine is depends on who else works on it. Go's runtime keeps a
		// thread that it once needed, so that one more in all is none lost; one
		// for each third cycle would be.
		most := before + before/10
		switch {
		case what == checkpointTime || what == restoreTime:
			most = 2 * before
		case strings.HasSuffix(what, threads):
			most = before + last/3
		}
		half := len(n) - last/2
		goesOn := slices.Min(n[half:])-slices.Min(n[len(n)-last:half]) > (after-before)/4 // half of it, where it is even
		if after > most && goesOn {
			s.Errorf("%s: at least %d in the last %d cycles, and %d in those before", what, after, last, before)
		}
	}
}

// size is that of all files of an image set together.
func (s *scenario) size(dir string) (bytes int) {
	s.Helper()
	files, err := os.ReadDir(dir)
	s.check(err)
	for _, f := range files {
		info, err := f.Info()
		s.check(err)
		bytes += int(info.Size())
	}
	return bytes
}

// shimNeeds gives what the one shim under test needs of the machine.
func (s *scenario) shimNeeds() map[string]int {
	s.Helper()
	pids, err := s.testbed.Pids(func(args []string) bool { return filepath.Base(args[0]) == "containerd-shim-kata-checkpoint-v2" })
	s.check(err)
	if len(pids) != 1 {
		s.Fatalf("there are %d shims", len(pids))
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pids[0]))
	s.check(err)
	return s.needs(string(status))
}

// agentNeeds gives what the agent needs of its guest.
func (s *scenario) agentNeeds(sandbox string) map[string]int {
	s.Helper()
	return s.needs(s.shellInGuestOf(sandbox, findAgent+"while read -r line; do echo \"$line\"; done </proc/$agent/status"))
}

// needs reads a process's status.
func (s *scenario) needs(status string) map[string]int {
	s.Helper()
	out := map[string]int{}
	for key, what := range map[string]string{"RssAnon": "memory, in KiB", "Threads": threads} {
		_, value, _ := strings.Cut(status, "\n"+key+":")
		fields := strings.Fields(value)
		if len(fields) == 0 {
			s.Fatalf("there is no %s in %q", key, status)
		}
		n, err := strconv.Atoi(fields[0])
		s.check(err)
		out[what] = n
	}
	return out
}

// inventoryComparison compares what there is after a step of a cycle and after
// that of a later one.
type inventoryComparison struct {
	when  string
	list  func() []string
	first []string
}

// compare looks at the step of a cycle, counted from 0, if it is one of the
// two.
func (a *inventoryComparison) compare(s *scenario, cycle, first, last int) {
	s.Helper()
	switch cycle {
	case first:
		a.first = a.list()
		defer s.step("listed what there is: %s", a.when)
		// What is about to go must not stand for what the last cycle leaves.
		if !s.eventually(settleTimeout, func() bool {
			before := a.first
			a.first = a.list()
			return slices.Equal(before, a.first)
		}) {
			now := a.list()
			s.Logf("%s, things keep changing: %q, %q", a.when, testbed.More(a.first, now), testbed.More(now, a.first))
		}
	case last:
		var more []string
		s.eventually(settleTimeout, func() bool {
			more = testbed.More(a.first, a.list())
			return len(more) == 0
		})
		for _, item := range more {
			s.Errorf("%s, there is more in cycle %d than in cycle %d: %s", a.when, last+1, first+1, item)
		}
		s.Logf("%s, there were %d things", a.when, len(a.first))
	}
}

func (s *scenario) hostInventory() []string {
	s.Helper()
	out, err := s.testbed.Inventory(s.ids...)
	s.check(err)
	return withoutCounter(out)
}

// withoutCounter leaves out the files that the counter makes, opens and renames
// all the time.
func withoutCounter(items []string) []string {
	return slices.DeleteFunc(items, func(item string) bool {
		return strings.HasSuffix(item, "count.new") || strings.HasSuffix(item, "count")
	})
}

func (s *scenario) guestInventory(sandbox client.Container) []string {
	s.Helper()
	out, err := s.testbed.GuestInventory(s.ctx, sandbox.ID(), s.ids...)
	s.check(err)
	return withoutCounter(out)
}
