// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/kata-checkpoint/kata-checkpoint/integration/cri"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// podTwoContainers: a checkpoint of one container of a pod does not affect the
// others. One that ended before them is no trouble, nor is one that is started
// again.
func podTwoContainers(s *scenario) {
	pod := s.runPod("two", cri.PodSpec{})
	setup := s.runIn(pod, cri.ContainerSpec{Name: "setup", Args: []string{"sh", "-c", "echo ready"}})
	if code, err := setup.Ended(s.ctx); err != nil || code != 0 {
		s.Fatalf("the init container ended with %d (%v)", code, err)
	}
	one, two := s.runIn(pod, counterNamed("one")), s.runIn(pod, counterNamed("two"))
	s.waitTicks(one, 5)
	s.waitTicks(two, 5)
	boots := func(c *cri.Container) string {
		lines, err := c.Lines()
		s.check(err)
		return strings.Join(workload.Boots(lines), " ")
	}
	if boots(one) != boots(two) {
		s.Errorf("the containers of one pod are in the boots %s and %s", boots(one), boots(two))
	}

	before := len(s.waitTicks(two, 1))
	s.crictl("checkpoint", "--export="+s.archive("one"), one.ID)
	during := len(s.waitTicks(two, 1)) - before
	// It counts ten times a second, and slower beside CRIU on a small machine;
	// it would not count at all if it were frozen.
	if during < 3 {
		s.Errorf("the other container counted %d times during the checkpoint", during)
	}
	s.checkConsecutive(1, s.waitTicks(two, before+during+5))
	s.checkConsecutive(1, s.waitTicks(one, len(s.waitTicks(one, 5))+5))

	// As the restart policy Always has it.
	s.check(one.Stop(s.ctx, 0))
	again := counterNamed("one")
	again.Attempt = 1
	s.checkConsecutive(1, s.waitTicks(s.runIn(pod, again), 5))
	s.check(one.Remove(s.ctx))
	s.checkConsecutive(1, s.waitTicks(two, len(s.waitTicks(two, 5))+5))
}

// podTwoAtOnce: two containers of a pod are checkpointed at the same time, and
// continue together in another one. They share a pid namespace, as crictl has
// it where a pod's configuration says nothing.
func podTwoAtOnce(s *scenario) {
	names := []string{"one", "two"}
	pod := s.runPod("before", cri.PodSpec{SharePIDs: true})
	containers := map[string]*cri.Container{}
	annotations, earlier := map[string]string{}, map[string]int{}
	for _, name := range names {
		containers[name] = s.runIn(pod, counterNamed(name))
	}
	archives := map[string]string{}
	for _, name := range names {
		earlier[name] = len(s.waitTicks(containers[name], 5))
		archives[name] = s.archive(name)
		annotations["kata-checkpoint.dev/restore."+name] = baseName(archives[name])
	}
	var running sync.WaitGroup
	errs := make(chan error, len(names))
	for _, name := range names {
		running.Go(func() { errs <- containers[name].Checkpoint(s.ctx, archives[name]) })
	}
	running.Wait()
	for range names {
		s.check(<-errs)
	}
	s.step("checkpointed both")
	later := map[string]int{}
	for _, name := range names {
		later[name] = len(s.waitTicks(containers[name], 5))
	}
	s.check(pod.Remove(s.ctx))

	after := s.runPod("after", cri.PodSpec{SharePIDs: true, Annotations: annotations})
	for _, name := range names {
		containers[name] = s.runIn(after, counterNamed(name))
	}
	for _, name := range names {
		s.checkContinuesBetween(containers[name], earlier[name], later[name])
	}
}

// checkContinuesBetween checks that a restored counter counts on from where it
// was checkpointed, which was between two numbers.
func (s *scenario) checkContinuesBetween(c *cri.Container, earliest, latest int) []int {
	s.Helper()
	ticks := s.waitTicks(c, 5)
	if at := ticks[0] - 1; at < earliest || at > latest {
		s.Errorf("%s continues after %d, and was checkpointed between %d and %d", c.Name, at, earliest, latest)
	}
	s.checkConsecutive(ticks[0], ticks)
	return ticks
}

// execProbeOutlivesCheckpoint: a probe every second waits for the thaw and
// succeeds; the container is not restarted for a checkpoint.
func execProbeOutlivesCheckpoint(s *scenario) {
	pod := s.runPod("probed", cri.PodSpec{})
	c := s.runIn(pod, cri.ContainerSpec{Name: "c", Args: []string{workload.Path, "memory", "--mib", "64", "--shm-mib", "4"}})
	s.check(c.Wait(s.ctx, func(lines []string) (bool, error) {
		rounds, err := workload.Rounds(lines)
		return len(rounds) >= 2, err
	}))
	ended := make(chan struct{})
	type probe struct {
		took time.Duration
		err  error
	}
	probes := make(chan []probe, 1)
	go func() {
		var all []probe
		for tick := time.NewTicker(time.Second); ; {
			begin := time.Now()
			_, err := c.Exec(s.ctx, "true")
			all = append(all, probe{time.Since(begin), err})
			select {
			case <-tick.C:
			case <-ended:
				tick.Stop()
				probes <- all
				return
			}
		}
	}()
	err := c.Checkpoint(s.ctx, s.archive("c"))
	close(ended)
	s.check(err)
	var slowest time.Duration
	all := <-probes
	for i, p := range all {
		if p.err != nil {
			s.Errorf("probe %d of %d, after %s: %v", i+1, len(all), p.took, p.err)
		}
		slowest = max(slowest, p.took)
	}
	s.step("checkpointed; %d probes, of which the slowest took %s", len(all), slowest.Round(time.Millisecond))
	lines, err := c.Lines()
	s.check(err)
	rounds, err := workload.Rounds(lines)
	s.check(err)
	s.check(c.Wait(s.ctx, func(lines []string) (bool, error) {
		now, err := workload.Rounds(lines)
		return len(now) > len(rounds)+1, err
	}))
}

// checkpointctlReadsIt: the program that shows checkpoints shows ours,
// processes, statistics and mounts included.
func checkpointctlReadsIt(s *scenario) {
	pod := s.runPod("shown", cri.PodSpec{})
	c := s.runIn(pod, counterNamed("c"))
	s.waitTicks(c, 2)
	archive := s.archive("c")
	s.check(c.Checkpoint(s.ctx, archive))
	s.step("checkpointed")
	for _, tc := range []struct {
		args []string
		want []string
	}{
		{[]string{"show", archive}, []string{"containerd", "workload", "c"}},
		{[]string{"inspect", archive, "--ps-tree"}, []string{"Process tree", "workload"}},
		{[]string{"inspect", archive, "--stats"}, []string{"CRIU dump statistics", "Freezing time", "Pages written"}},
		{[]string{"inspect", archive, "--mounts"}, []string{"Overview of mounts", "/etc/hosts", "/dev/shm"}},
	} {
		out := s.checkpointctl(tc.args...)
		for _, want := range tc.want {
			if !strings.Contains(out, want) {
				s.Errorf("checkpointctl %s says nothing of %q: %s", fmt.Sprint(tc.args), want, out)
			}
		}
	}
}
