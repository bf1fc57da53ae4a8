// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"github.com/containerd/containerd/v2/client"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// counter is a container that counts.
func counter(id string) engine.Container {
	return engine.Container{ID: id, Args: []string{workload.Path, "counter"}}
}

// exitAndRestore: a container that is checkpointed and stopped by ctr continues
// in another VM as if nothing had happened.
func exitAndRestore(s *scenario) {
	c := s.create(counter("c"))
	first := s.run(c)
	s.waitNumbers(first.Output, workload.Ticks, 5)

	dir := s.newDir()
	s.ctr("task", "checkpoint", "--exit", "--image-path", dir, c.ID())
	s.waitExit(first, 137)
	s.checkExitEvents(c, 137)
	before := s.printedNumbers(first.Output, workload.Ticks)

	restored := s.restore(c, dir)
	after := s.waitNumbers(restored.Output, workload.Ticks, 5)
	s.checkConsecutive(1, append(before, after...))
	s.checkOtherVM(first, restored)

	s.remove(c)
	s.checkExitEvents(c, 137, 137) // of the checkpoint, and of the removal: one each
}

// leaveRunning: a checkpoint in passing costs the container nothing, and what
// it saved, memory and files, is of one instant.
func leaveRunning(s *scenario) {
	c := s.create(counter("c"))
	first := s.run(c)
	before := s.waitNumbers(first.Output, workload.Ticks, 5)

	const reference = "checkpoint.test/leave-running:latest"
	image, err := s.engine.Commit(s.ctx, c, reference)
	s.check(err)
	s.step("checkpointed with the writable layer")
	at := s.printedNumbers(first.Output, workload.Ticks)
	s.checkStatus(first, client.Running)
	s.checkConsecutive(1, s.waitNumbers(first.Output, workload.Ticks, len(at)+10))
	s.checkExitEvents(c)

	s.remove(c)
	restored, err := s.engine.RestoreImage(s.ctx, s.id("restored"), image)
	s.check(err)
	s.step("restored under another name")
	after := s.waitNumbers(restored.Output, workload.Ticks, 5)
	if last := after[0] - 1; last < len(before) || last > len(at) {
		s.Errorf("the restored counter continues after %d; at the checkpoint it was between %d and %d", last, len(before), len(at))
	}
	s.checkConsecutive(after[0], after)
	s.checkOtherVM(first, restored)
	s.check(s.engine.Client.ImageService().Delete(s.ctx, reference))
}

// pausedBefore: a pause is the user's. A checkpoint neither ends it nor needs
// to make one of its own.
func pausedBefore(s *scenario) {
	c := s.create(counter("c"))
	first := s.run(c)
	s.waitNumbers(first.Output, workload.Ticks, 5)

	s.check(first.Pause(s.ctx))
	s.checkStatus(first, client.Paused)
	s.checkpoint(first, false)
	s.checkStatus(first, client.Paused)
	s.checkSilent(first.Output)
	at := s.printedNumbers(first.Output, workload.Ticks)
	s.check(first.Resume(s.ctx))
	s.checkStatus(first, client.Running)
	s.checkConsecutive(1, s.waitNumbers(first.Output, workload.Ticks, len(at)+5))

	// An image set of a paused container is as good as any, and a paused
	// container can be removed.
	s.check(first.Pause(s.ctx))
	dir := s.checkpoint(first, false)
	s.check(s.engine.EndTask(s.ctx, c))
	s.checkExitEvents(c, 137)
	before := s.printedNumbers(first.Output, workload.Ticks)
	restored := s.restore(c, dir)
	s.checkStatus(restored, client.Running)
	s.checkConsecutive(1, append(before, s.waitNumbers(restored.Output, workload.Ticks, 5)...))
}

// sharedAndPrivateMounts: it makes no difference whether mounts in the guest
// are shared, as systemd makes them, or private.
func sharedAndPrivateMounts(s *scenario) {
	c := s.create(counter("c"))
	first := s.run(c)
	s.checkGuestMounts(c.ID())
	s.waitNumbers(first.Output, workload.Ticks, 5)
	dir := s.checkpoint(first, true)
	s.waitExit(first, 137)
	before := s.printedNumbers(first.Output, workload.Ticks)
	restored := s.restore(c, dir)
	s.checkConsecutive(1, append(before, s.waitNumbers(restored.Output, workload.Ticks, 5)...))
	s.checkOtherVM(first, restored)
}

// shmAndMemory: every byte of memory and of /dev/shm comes back. The checkpoint
// is taken as nerdctl does it, without options, which ends a container.
func shmAndMemory(s *scenario) {
	c := s.create(engine.Container{ID: "c", Args: []string{workload.Path, "memory", "--mib", "64", "--shm-mib", "16"}})
	first := s.run(c)
	s.waitNumbers(first.Output, workload.Rounds, 2)
	dir := s.newDir()
	s.check(s.engine.CheckpointByDefault(s.ctx, first, dir))
	s.step("checkpointed as nerdctl does")
	s.waitExit(first, 137)
	before := s.printedNumbers(first.Output, workload.Rounds)
	restored := s.restore(c, dir)
	s.checkConsecutive(1, append(before, s.waitNumbers(restored.Output, workload.Rounds, 5)...))
	s.checkOtherVM(first, restored)
}
