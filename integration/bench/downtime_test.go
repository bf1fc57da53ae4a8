// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"errors"
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

	"github.com/kata-checkpoint/kata-checkpoint/integration/cri"
	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/parts"
	"github.com/kata-checkpoint/kata-checkpoint/integration/testbed"
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
								b.ReportMetric(ofMedians(d.gap, plain.gap), "gap/plain-gap")
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

// BenchmarkDowntimeCRI measures the same of a pod's container, which the CRI
// checkpoints into an archive. The engine's time is that of packing it, too.
func BenchmarkDowntimeCRI(b *testing.B) {
	sizes, percents := []int{16, 256}, []int{5}
	if *full {
		sizes, percents = []int{16, 256, 1024}, []int{0, 5, 20}
	}
	runOn(b, testbed.Options{CRI: true}, func(s *bench) error {
		client, err := cri.Dial(s.bed.Address, testbed.Handler, filepath.Join(s.bed.Dir, "log/pods"))
		if err != nil {
			return err
		}
		defer client.Close()
		if err := client.Ready(b.Context()); err != nil {
			return err
		}
		for _, mib := range sizes {
			for _, percent := range percents {
				var plain downtime
				for _, m := range []podMode{{name: "plain"}, {name: "thaw", readOnly: true}, {name: "predump", preDump: true}, {name: "both", readOnly: true, preDump: true}} {
					b.Run(fmt.Sprintf("%dMiB/%dpercent/%s", mib, percent, m.name), func(b *testing.B) {
						d, err := s.podDowntimes(b, client, m, mib, percent)
						if err != nil {
							b.Fatal(err)
						}
						if m.name == "plain" {
							plain = d
						} else if len(plain.gap) > 0 {
							b.ReportMetric(ofMedians(d.gap, plain.gap), "gap/plain-gap")
						}
					})
				}
			}
		}
		return nil
	})
}

// podMode is a way to have a pod's container checkpointed.
type podMode struct {
	name string
	// readOnly is the root file system, so that the container is thawed early.
	readOnly, preDump bool
}

// podDowntimes measures checkpoints of a pod's container in one mode.
func (s *bench) podDowntimes(b *testing.B, client *cri.Client, m podMode, mib, percent int) (d downtime, err error) {
	ctx := b.Context()
	name := fmt.Sprintf("%s-%d-%d", m.name, mib, percent)
	spec := cri.ContainerSpec{
		Name: "c", Image: parts.WorkloadImageName, ReadOnlyRoot: m.readOnly,
		Args: []string{workload.Path, "pulse", "--mib", strconv.Itoa(mib), "--percent", strconv.Itoa(percent)},
	}
	if m.preDump {
		spec.Annotations = map[string]string{annotations.PreDumpKey: annotations.PreDumpAuto}
	}
	pod, err := client.RunPod(ctx, cri.PodSpec{Name: name, Namespace: "bench", UID: name})
	if err != nil {
		return d, err
	}
	defer func() { err = errors.Join(err, pod.Remove(context.WithoutCancel(ctx))) }()
	c, err := pod.Run(ctx, spec)
	if err != nil {
		return d, err
	}
	const few = 3
	more := func(at int) error {
		return c.Wait(ctx, func(lines []string) (bool, error) { return len(lines) >= at+few, nil })
	}
	once := func(d *downtime) error {
		if err := s.warm(3*mib + spareMiB); err != nil {
			return err
		}
		before, err := c.Lines()
		if err != nil {
			return err
		}
		if err := more(len(before)); err != nil { // what was before is behind it
			return err
		}
		if before, err = c.Lines(); err != nil {
			return err
		}
		archive := filepath.Join(s.bed.Dir, "tmp", name+".tar")
		defer os.Remove(archive)
		begin := time.Now()
		if err := c.Checkpoint(ctx, archive); err != nil {
			return err
		}
		wall := time.Since(begin)
		after, err := c.Lines()
		if err != nil {
			return err
		}
		if err := more(len(after)); err != nil {
			return err
		}
		if after, err = c.Lines(); err != nil {
			return err
		}
		gap, err := workload.Longest(after[len(before):])
		if err != nil {
			return err
		}
		d.gap, d.wall = append(d.gap, gap), append(d.wall, wall)
		return nil
	}
	// The first one loads CRIU into the guest, and is not counted.
	if err := once(&downtime{}); err != nil {
		return d, err
	}
	for b.Loop() {
		if err := once(&d); err != nil {
			return d, err
		}
	}
	b.ReportMetric(float64(median(d.wall)), "ns/op")
	b.ReportMetric(milliseconds(median(d.gap)), "gap-ms")
	b.ReportMetric(milliseconds(slices.Max(d.gap)), "longest-gap-ms")
	return d, nil
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
