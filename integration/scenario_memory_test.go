// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
)

// memory256: a workload of 256 MiB comes back whole. A liveness probe every
// second outlives the checkpoint. What it costs is printed.
func memory256(s *scenario) {
	const mib = 256
	c := s.create(engine.Container{ID: "c", Args: []string{workload.Path, "memory", "--mib", fmt.Sprint(mib), "--shm-mib", "0", "--every", "500ms"}})
	first := s.run(c)
	s.waitNumbers(first.Output, workload.Rounds, 2)
	cached := s.checkPageCache(first, math.MaxInt)

	stop, probes, n := make(chan struct{}), make(chan error, 1), 0
	go func() {
		defer close(probes)
		for ticker := time.NewTicker(time.Second); ; {
			if err := s.probe(first, n); err != nil {
				probes <- err
				return
			}
			n++
			select {
			case <-ticker.C:
			case <-stop:
				return
			}
		}
	}()
	guest, host := s.bytesWritten(c.ID(), "virtiofsd"), s.bytesWritten(c.ID(), "containerd-shim-kata-checkpoint-v2")
	dir := s.checkpoint(first, false)
	guest, host = s.bytesWritten(c.ID(), "virtiofsd")-guest, s.bytesWritten(c.ID(), "containerd-shim-kata-checkpoint-v2")-host
	s.waitNumbers(first.Output, workload.Rounds, len(s.printedNumbers(first.Output, workload.Rounds))+2)
	close(stop)
	for err := range probes {
		s.Errorf("a liveness probe failed: %v", err)
	}
	if n < 2 {
		s.Errorf("there were %d liveness probes", n)
	}
	s.checkCosts(dir, guest, host)
	s.checkPageCache(first, cached+mib/4)

	s.remove(c)
	c = s.create(engine.Container{ID: "again", Args: []string{workload.Path, "memory", "--mib", fmt.Sprint(mib), "--shm-mib", "0", "--every", "500ms"}})
	restored := s.restore(c, dir)
	rounds := s.waitNumbers(restored.Output, workload.Rounds, 2)
	s.checkConsecutive(rounds[0], rounds)
	s.checkOtherVM(first, restored)
	s.checkPageCache(restored, cached+mib/4)
	// The workload, and the exec itself: the agent does without huge pages,
	// they do not.
	const huge = "THP_enabled:\t1"
	if lines := s.shell(restored, "cat /proc/[0-9]*/status | grep THP_enabled: | sort -u"); len(lines) != 1 || lines[0] != huge {
		s.Errorf("huge pages of what was restored, and of an exec into it: %q, not %q", lines, huge)
	}
}

// checkPageCache is how much of files the guest has in memory, in MiB, after a
// moment not more than limit: stale image sets do not stay
// there.
func (s *scenario) checkPageCache(run *engine.Run, limit int) int {
	s.Helper()
	lines := s.shell(run, fmt.Sprintf(`for i in $(seq 50); do c=$(awk '/^Cached:/ { print int($2/1024) }' /proc/meminfo); [ $c -gt %d ] || break; sleep 0.2; done; echo $c`, limit))
	mib, err := strconv.Atoi(strings.Join(lines, ""))
	s.check(err)
	if mib > limit {
		s.Errorf("the guest has %d MiB of files in memory, more than %d", mib, limit)
	}
	return mib
}

// checkCosts prints what the checkpoint in a directory took.
func (s *scenario) checkCosts(dir string, guest, host int64) {
	s.Helper()
	m := s.readManifest(dir)
	var frozen, writing time.Duration
	for _, phase := range m.Phases {
		s.Logf("%8.0f ms  %s", float64(phase.Duration)/float64(time.Millisecond), phase.Name)
		frozen += phase.Duration
		if phase.Name == "guest: criu dump" || phase.Name == "copy images" {
			writing += phase.Duration
		}
	}
	const mib = 1 << 20
	s.Logf("image set of %d MiB; written: %d MiB by the guest, %d MiB by the host", m.Bytes()/mib, guest/mib, host/mib)
	s.Logf("%.0f %% of %s were spent writing", 100*writing.Seconds()/frozen.Seconds(), frozen.Round(time.Millisecond))
	if m.Bytes() < 256*mib {
		s.Errorf("the image set has %d bytes", m.Bytes())
	}
	if guest > 2*m.Bytes() || host > 2*m.Bytes() {
		s.Errorf("of an image set of %d bytes, the guest wrote %d and the host %d", m.Bytes(), guest, host)
	}
}

// readManifest reads the manifest of an image set.
func (s *scenario) readManifest(dir string) (m imageset.Manifest) {
	s.Helper()
	data, err := os.ReadFile(filepath.Join(dir, imageset.ManifestName))
	s.check(err)
	s.check(json.Unmarshal(data, &m))
	return m
}

// bytesWritten gives how many bytes a container's processes of a program have
// written to files.
func (s *scenario) bytesWritten(id, program string) (sum int64) {
	s.Helper()
	residue, err := s.testbed.Residue(id)
	s.check(err)
	for _, line := range residue {
		var pid int
		if _, err := fmt.Sscanf(line, "process %d:", &pid); err != nil || !strings.Contains(line, program) || !strings.Contains(line, id) {
			continue
		}
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", pid))
		s.check(err)
		for field := range strings.Lines(string(data)) {
			var n int64
			if _, err := fmt.Sscanf(field, "wchar: %d", &n); err == nil {
				sum += n
			}
		}
	}
	return sum
}
