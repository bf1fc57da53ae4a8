package integration

import (
	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// processTree: a tree of processes with one of each kind of thing that processes hold goes on with all of them. The workload checks that.
func processTree(s *scenario) {
	c := s.create(engine.Container{ID: "c", Args: []string{workload.Path, "tree"}})
	first := s.run(c)
	s.printed(first.Output, workload.Rounds, 5)
	dir := s.dir()
	s.check(s.engine.CheckpointByDefault(s.ctx, first, dir)) // as nerdctl does, whose checkpoints have file locks
	s.step("checkpointed")
	s.ended(first, 137)
	before := s.numbers(first.Output, workload.Rounds)
	restored := s.restore(c, dir)
	s.consecutive(1, append(before, s.printed(restored.Output, workload.Rounds, 10)...))
	s.movedOn(first, restored)
}
