// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"

	"github.com/kata-checkpoint/kata-checkpoint/integration/cri"
	"github.com/kata-checkpoint/kata-checkpoint/integration/parts"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// scrape returns the figures that the NRI plugin serves, by their names with
// labels.
func (s *scenario) scrape() map[string]float64 {
	s.Helper()
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", s.testbed.MetricsSocket())
	}}}
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(s.ctx, http.MethodGet, "http://node/metrics", nil)
	s.check(err)
	resp, err := client.Do(req)
	s.check(err)
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	s.check(err)
	out := map[string]float64{}
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, "#") {
			continue
		}
		i := strings.LastIndexByte(line, ' ')
		value, err := strconv.ParseFloat(strings.TrimSpace(line[i+1:]), 64)
		s.check(err)
		out[line[:i]] = value
	}
	return out
}

// checkCounted checks by how much figures have grown.
func (s *scenario) checkCounted(before, after, want map[string]float64) {
	s.Helper()
	for name, n := range want {
		if have := after[name] - before[name]; have != n {
			s.Errorf("%s has grown by %v, not %v", name, have, n)
		}
	}
}

// metricsServed: the NRI plugin's process serves the figures of the shims, of
// those that have ended as well, and misses none while it does not run.
func metricsServed(s *scenario) {
	const (
		checkpoints = `kata_checkpoint_checkpoint_operations_total{reason="",result="success"}`
		refusals    = `kata_checkpoint_checkpoint_operations_total{reason="io-uring",result="failure"}`
		restores    = `kata_checkpoint_restore_operations_total{reason="",result="success"}`
		frozen      = `kata_checkpoint_frozen_seconds_count`
		dumps       = `kata_checkpoint_phase_duration_seconds_count{operation="checkpoint",phase="guest: criu dump"}`
		running     = `kata_checkpoint_operations_in_progress{operation="checkpoint"}`
		bytes       = `kata_checkpoint_image_size_bytes_sum`
		kept        = `kata_checkpoint_stored_bytes{directory="restore_dir"}`
	)
	begin := s.scrape()
	if begin[running] != 0 {
		s.Errorf("before anything there are %v checkpoints in progress", begin[running])
	}
	pod := s.runPod("figures", cri.PodSpec{Annotations: map[string]string{"kata-checkpoint.dev/after": "stop"}})
	c := s.runIn(pod, counterNamed("c"))
	uring, err := pod.Create(s.ctx, cri.ContainerSpec{Name: "uring", Image: parts.WorkloadImageName, Args: []string{workload.Path, "io-uring"}})
	s.check(err)
	s.check(uring.Start(s.ctx))
	s.waitTicks(c, 3)
	attempts := 0.
	s.eventually(settleTimeout, func() bool {
		attempts++
		err := uring.Checkpoint(s.ctx, s.archive("uring"))
		return err != nil && strings.Contains(err.Error(), "io_uring")
	})
	archive := s.archive("c")
	s.check(c.Checkpoint(s.ctx, archive))
	s.check(pod.Remove(s.ctx)) // its shim has ended
	s.step("a checkpoint, and one that is refused")
	after := s.scrape()
	// The CRI pauses before it asks: what is refused has been frozen as well.
	s.checkCounted(begin, after, map[string]float64{checkpoints: 1, frozen: 1 + attempts, dumps: 1, restores: 0, running: 0})
	if after[refusals] < begin[refusals]+1 || after[bytes] <= begin[bytes] || after[kept] <= begin[kept] {
		s.Errorf("refused: %v, bytes: %v, kept: %v", after[refusals], after[bytes], after[kept])
	}

	// What happens while nobody reads is counted afterwards.
	s.check(s.testbed.KillNRI(s.ctx))
	started := false
	s.afterContainers(func() error {
		if started {
			return nil
		}
		return s.testbed.StartNRI(context.WithoutCancel(s.ctx))
	})
	pod = s.runPod("restored", cri.PodSpec{Annotations: fromArchive(archive)})
	s.waitTicks(s.runIn(pod, counterNamed("c")), 5)
	s.step("a restore without a reader")
	s.check(s.testbed.StartNRI(s.ctx))
	started = true
	if after := s.scrape(); after[restores] != 1 || after[checkpoints] != 0 {
		s.Errorf("the new process has counted %v restores and %v checkpoints", after[restores], after[checkpoints])
	}
}
