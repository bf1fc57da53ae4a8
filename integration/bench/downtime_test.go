// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/stats"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/parts"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
)

// downtimeMode is a way to checkpoint a container that is left running.
type downtimeMode struct {
	name string
	with map[string]string // annotations
}

var downtimeModes = []downtimeMode{
	{"plain", nil},
	{"thaw", map[string]string{annotations.ThawKey: annotations.AfterDump}},
	{"predump", map[string]string{annotations.PreDumpKey: annotations.PreDumpAuto}},
	{"both", map[string]string{annotations.ThawKey: annotations.AfterDump, annotations.PreDumpKey: annotations.PreDumpAuto}},
}

// downtime is what was measured of a mode.
type downtime struct{ gap, wall, frozen []time.Duration }

// BenchmarkDowntime measures the longest gap that a workload sees while it is
// checkpointed and left running, beside the time for which CRIU has frozen it and
// the time that the engine takes: with the calls of ctr, into a directory, and
// with those of nerdctl, into containerd's store.
func BenchmarkDowntime(b *testing.B) {
	sizes, percents := []int{16, 256}, []int{5}
	if *full {
		sizes, percents = []int{16, 256, 1024}, []int{0, 5, 20}
	}
	run(b, func(s *bench) error {
		for _, mib := range sizes {
			for _, percent := range percents {
				for _, with := range []string{"ctr", "nerdctl"} {
					var plain downtime
					for _, m := range downtimeModes {
						b.Run(fmt.Sprintf("%s/%dMiB/%dpercent/%s", with, mib, percent, m.name), func(b *testing.B) {
							d, err := s.downtimes(b, m, with, mib, percent)
							if err != nil {
								b.Fatal(err)
							}
							if m.name == "plain" {
								plain = d
							} else if len(plain.gap) > 0 {
								b.ReportMetric(ratio(d.gap, plain.gap), "gap/plain-gap")
							}
						})
					}
				}
			}
		}
		return nil
	})
}

// downtimes measures checkpoints of a container in one mode.
func (s *bench) downtimes(b *testing.B, m downtimeMode, with string, mib, percent int) (d downtime, err error) {
	ctx := b.Context()
	notes := map[string]string{annotations.AfterKey: annotations.LeaveRunning}
	maps.Copy(notes, m.with)
	container, err := s.engine.Create(ctx, engine.Container{
		ID: fmt.Sprintf("%s-%s-%d-%d", m.name, with, mib, percent), Image: parts.WorkloadImageName, Annotations: notes,
		Args: []string{workload.Path, "pulse", "--mib", strconv.Itoa(mib), "--percent", strconv.Itoa(percent)},
	})
	if err != nil {
		return d, err
	}
	run, err := s.engine.Start(ctx, container)
	if err != nil {
		return d, err
	}
	if err := settled(ctx, run); err != nil {
		return d, err
	}
	// The first one loads CRIU into the guest, and is not counted.
	if err := s.downtime(ctx, run, with, mib, &downtime{}); err != nil {
		return d, err
	}
	for b.Loop() {
		if err := s.downtime(ctx, run, with, mib, &d); err != nil {
			return d, err
		}
	}
	b.ReportMetric(float64(median(d.wall)), "ns/op")
	b.ReportMetric(milliseconds(median(d.gap)), "gap-ms")
	b.ReportMetric(milliseconds(slices.Max(d.gap)), "longest-gap-ms")
	if len(d.frozen) > 0 {
		b.ReportMetric(milliseconds(median(d.frozen)), "frozen-ms")
		b.ReportMetric(ratio(d.gap, d.frozen), "gap/frozen")
	}
	return d, s.engine.Remove(ctx, run.ID())
}

// downtime measures one checkpoint.
func (s *bench) downtime(ctx context.Context, run *engine.Run, with string, mib int, d *downtime) error {
	if err := s.warm(2*mib + spareMiB); err != nil {
		return err
	}
	if err := s.more(ctx, run, 3); err != nil { // what was before is behind it
		return err
	}
	dir := filepath.Join(s.bed.Dir, "tmp", run.ID())
	images, work := filepath.Join(dir, "images"), filepath.Join(dir, "work")
	if err := os.MkdirAll(images, 0o700); err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	before := len(run.Output.Lines())
	begin := time.Now()
	var err error
	if with == "ctr" {
		err = s.engine.CheckpointWith(ctx, run.Task, images, &runcoptions.CheckpointOptions{WorkPath: work})
	} else {
		err = s.engine.CheckpointByDefault(ctx, run.Task, images)
	}
	wall := time.Since(begin)
	if err != nil {
		return err
	}
	if err := s.more(ctx, run, 3); err != nil {
		return err
	}
	gap, err := workload.Longest(run.Output.Lines()[before:])
	if err != nil {
		return err
	}
	d.gap, d.wall = append(d.gap, gap), append(d.wall, wall)
	if with == "ctr" {
		frozen, err := frozenTime(work)
		if err != nil {
			return err
		}
		d.frozen = append(d.frozen, frozen)
	}
	return nil
}

// more waits until a workload has completed more rounds.
func (s *bench) more(ctx context.Context, run *engine.Run, n int) error {
	at := len(run.Output.Lines())
	return run.Output.Wait(ctx, func(lines []string) (bool, error) { return len(lines) >= at+n, nil })
}

// frozenTime is for how long CRIU had the processes frozen, by its statistics.
func frozenTime(dir string) (time.Duration, error) {
	f, err := os.Open(dir)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	dump, err := stats.CriuGetDumpStats(f)
	if err != nil {
		return 0, err
	}
	return time.Duration(dump.GetFrozenTime()) * time.Microsecond, nil
}
