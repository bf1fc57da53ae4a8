// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// processTree: a tree of processes with one of each kind of thing that
// processes hold continues with all of them. The workload checks that.
func processTree(s *scenario) {
	c := s.create(engine.Container{ID: "c", Args: []string{workload.Path, "tree"}})
	first := s.run(c)
	s.waitNumbers(first.Output, workload.Rounds, 5)
	dir := s.newDir()
	s.check(s.engine.CheckpointByDefault(s.ctx, first, dir)) // as nerdctl does, whose checkpoints have file locks
	s.step("checkpointed")
	s.waitExit(first, 137)
	before := s.printedNumbers(first.Output, workload.Rounds)
	restored := s.restore(c, dir)
	s.checkConsecutive(1, append(before, s.waitNumbers(restored.Output, workload.Rounds, 10)...))
	s.checkOtherVM(first, restored)
}
