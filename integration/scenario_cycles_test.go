package integration

import (
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/client"

	"github.com/kata-checkpoint/kata-checkpoint/integration/testbed"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// cycles is how many times a container is checkpointed and restored. What the first leaves may be there for good; what every one leaves shows.
const cycles = 3

// threeCycles: a container that is checkpointed and restored again and again, each time in a new VM, goes on counting. Nothing is more, on the
// machine or in its guest, after the last restore than after the first.
func threeCycles(s *scenario) {
	c := s.create(counter("c"))
	run := s.run(c)
	s.printed(run.Output, workload.Ticks, 5)
	first := run
	var numbers []int
	ended := account{after: "after a checkpoint that ended the container", list: s.hostInventory}
	restored := account{after: "after a restore", list: func() []string { return append(s.hostInventory(), s.guestInventory(c)...) }}
	for i := range cycles {
		dir := s.checkpoint(run, true)
		s.ended(run, 137)
		numbers = append(numbers, s.numbers(run.Output, workload.Ticks)...)
		ended.of(s, i)

		run = s.restore(c, dir)
		s.consecutive(1, append(slices.Clone(numbers), s.printed(run.Output, workload.Ticks, 5)...))
		restored.of(s, i)
	}
	s.exits(c, slices.Repeat([]uint32{137}, cycles)...)
	s.movedOn(first, run)
	s.removed(c)
}

// account compares what there is after a step of the first cycle and after that of the last.
type account struct {
	after string
	list  func() []string
	first []string
}

// of looks at the step of a cycle, counted from 0.
func (a *account) of(s *scenario, cycle int) {
	s.Helper()
	switch cycle {
	case 0:
		a.first = a.list()
		defer s.step("listed what there is: %s", a.after)
		// What is about to go must not stand for what the last cycle leaves.
		if !s.eventually(settleTimeout, func() bool {
			before := a.first
			a.first = a.list()
			return slices.Equal(before, a.first)
		}) {
			now := a.list()
			s.Logf("%s, things keep changing: %q, %q", a.after, testbed.More(a.first, now), testbed.More(now, a.first))
		}
	case cycles - 1:
		var more []string
		s.eventually(settleTimeout, func() bool {
			more = testbed.More(a.first, a.list())
			return len(more) == 0
		})
		for _, item := range more {
			s.Errorf("%s, there is more in cycle %d than in the first: %s", a.after, cycles, item)
		}
		s.Logf("%s, there were %d things", a.after, len(a.first))
	}
}

func (s *scenario) hostInventory() []string {
	s.Helper()
	out, err := s.bed.Inventory(s.ids...)
	s.check(err)
	return out
}

func (s *scenario) guestInventory(sandbox client.Container) []string {
	s.Helper()
	out, err := s.bed.GuestInventory(s.ctx, sandbox.ID(), s.ids...)
	s.check(err)
	// The counter's, which it makes and renames all the time.
	return slices.DeleteFunc(out, func(item string) bool { return strings.HasSuffix(item, "count.new") })
}
