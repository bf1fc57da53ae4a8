// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/client"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// What many checkpoints at once may take.
const (
	// mostOverSerial is the time over that of as many, one after the other, in a
	// guest with one processor: dumps take turns.
	mostOverSerial = 1.3
	// mostState is how long State and Kill may take beside a checkpoint of eight
	// containers, without KVM.
	mostState = 5 * time.Second
	// mostMemory is what the shim and the agent may take in addition for a
	// checkpoint, in MiB for each container: the buffers of a copy.
	mostMemory = 8
)

// manyAtOnce: all containers of a pod are checkpointed at the same time. That takes
// hardly longer than one after the other, State and Kill of the pod's other
// containers are answered meanwhile, and neither the shim nor the agent grows with
// the memory of the containers. The same for several pods.
func manyAtOnce(s *scenario) {
	const containers = 8
	pod := s.startPod()
	idle, doomed := s.run(pod.create(engine.Container{ID: "idle", Args: []string{workload.Path, "idle"}})), s.run(pod.create(engine.Container{ID: "doomed", Args: []string{workload.Path, "idle"}}))
	runs := s.startMany(pod, "c", containers)
	shim, agent := s.peakMemory(idle), s.peakMemoryOfAgent(pod)
	alone := s.checkpointAll(runs[:1])
	s.step("one alone took %s", alone.Round(time.Millisecond))

	ended := make(chan struct{})
	var slowest time.Duration
	var watch sync.WaitGroup
	watch.Go(func() { slowest = s.slowestState(idle, ended) })
	var killed time.Duration
	watch.Go(func() {
		begin := time.Now()
		if err := doomed.Kill(s.ctx, syscall.SIGKILL); err != nil {
			s.Errorf("a kill beside checkpoints: %v", err)
		}
		killed = time.Since(begin)
	})
	together := s.checkpointAll(runs)
	close(ended)
	watch.Wait()
	s.waitExit(doomed, 137)
	s.checkStatus(idle, client.Running)
	s.step("%d took %s, %.2f times as long as one after the other; State took %s at most, and Kill %s", containers, together.Round(time.Millisecond),
		together.Seconds()/(containers*alone.Seconds()), slowest.Round(time.Millisecond), killed.Round(time.Millisecond))
	if most := time.Duration(mostOverSerial * containers * float64(alone)); together > most {
		s.Errorf("%d checkpoints at once took %s, more than %s", containers, together, most)
	}
	if slowest > mostState || killed > mostState {
		s.Errorf("State took %s and Kill %s, more than %s", slowest, killed, mostState)
	}
	shim, agent = s.peakMemory(idle)-shim, s.peakMemoryOfAgent(pod)-agent
	s.step("the shim has taken %d MiB more, and the agent %d MiB", shim, agent)
	if most := containers * mostMemory; shim > most || agent > most {
		s.Errorf("the shim has taken %d MiB more and the agent %d MiB, more than %d", shim, agent, most)
	}
	for _, run := range runs {
		s.checkKeepsRunning(run)
	}

	pods := min(max(runtime.NumCPU(), 2), 4)
	for i := range pods - 1 {
		runs = append(runs, s.startMany(s.startPodNamed("pod-"+strconv.Itoa(i)), "of-"+strconv.Itoa(i), 1)...)
	}
	several := runs[len(runs)-pods:]
	together = s.checkpointAll(several)
	s.step("%d pods took %s, %.2f times as long as one after the other", pods, together.Round(time.Millisecond), together.Seconds()/(float64(pods)*alone.Seconds()))
	if most := time.Duration(mostOverSerial * float64(pods) * float64(alone)); together > most {
		s.Errorf("checkpoints of %d pods at once took %s, more than %s", pods, together, most)
	}
	for _, run := range several {
		s.checkKeepsRunning(run)
	}
}

// startMany starts containers with 16 MiB of memory each.
func (s *scenario) startMany(pod *pod, name string, n int) (runs []*engine.Run) {
	s.Helper()
	for i := range n {
		runs = append(runs, s.run(pod.create(engine.Container{
			ID: name + strconv.Itoa(i), Args: []string{workload.Path, "memory", "--mib", "16", "--shm-mib", "0", "--every", "500ms"},
		})))
	}
	for _, run := range runs {
		s.waitNumbers(run.Output, workload.Rounds, 2)
	}
	s.checkpointAll(runs[:1]) // which loads CRIU into the guest
	return runs
}

// checkpointAll checkpoints containers at the same time, leaves them running, and
// returns how long all took.
func (s *scenario) checkpointAll(runs []*engine.Run) time.Duration {
	s.Helper()
	sets := make([]string, len(runs))
	for i := range sets {
		sets[i] = s.newDir()
	}
	errs := make([]error, len(runs))
	begin := time.Now()
	var all sync.WaitGroup
	for i, run := range runs {
		all.Go(func() { errs[i] = s.requestCheckpoint(run, sets[i]) })
	}
	all.Wait()
	took := time.Since(begin)
	for i, err := range errs {
		if err != nil {
			s.Fatalf("checkpoint %d of %d at once: %v", i, len(runs), err)
		}
		s.check(verify(sets[i], s.newDir()))
	}
	return took
}

// slowestState asks for the state of a task until ended is closed.
func (s *scenario) slowestState(run *engine.Run, ended <-chan struct{}) (slowest time.Duration) {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ended:
			return slowest
		case <-tick.C:
		}
		begin := time.Now()
		if _, err := run.Status(s.ctx); err != nil {
			s.Errorf("State beside checkpoints: %v", err)
			return slowest
		}
		slowest = max(slowest, time.Since(begin))
	}
}

// peakMemory is the most memory that the shim of a container's pod has had, in
// MiB.
func (s *scenario) peakMemory(run *engine.Run) int {
	s.Helper()
	pids, err := s.testbed.Pids(func(args []string) bool { return filepath.Base(args[0]) == "containerd-shim-kata-checkpoint-v2" })
	s.check(err)
	most := 0
	for _, pid := range pids {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		s.check(err)
		most = max(most, s.peakIn(string(data)))
	}
	if most == 0 {
		s.Fatalf("%s has no shim", run.ID())
	}
	return most
}

// peakMemoryOfAgent is the most memory that the agent of a pod has had, in MiB.
func (s *scenario) peakMemoryOfAgent(p *pod) int {
	s.Helper()
	return s.peakIn(s.shellInGuest(p, findAgent+"cat /proc/$agent/status"))
}

func (s *scenario) peakIn(status string) int {
	s.Helper()
	_, rest, _ := strings.Cut(status, "\nVmHWM:")
	fields := strings.Fields(rest)
	if len(fields) == 0 {
		s.Fatalf("there is no VmHWM in %q", status)
	}
	kib, err := strconv.Atoi(fields[0])
	s.check(err)
	return kib >> 10
}
