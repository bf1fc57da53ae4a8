// SPDX-License-Identifier: Apache-2.0

// Package bench measures what kata-checkpoint adds: to a bare CRIU dump in the
// same guest (bytes and time), to calls of Kata's shim, and to an exec. Its
// output is what benchstat reads; bounds are ratios, so that they hold on any
// machine, and a missed one fails the run. `make bench` runs it.
//
// What is compared is measured in turns, in one run on one machine. All values
// are medians, and those of comparisons are medians of the ratios of such turns.
package bench

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/log"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/parts"
	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/vmm"
	"github.com/kata-checkpoint/kata-checkpoint/integration/testbed"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

var (
	kata = flag.String("kata", "", "`directory` with a real Kata to use instead of the stand-in")
	way  = flag.String("way", "", "which Kata the stand-in imitates: go (default) or rust")
	full = flag.Bool("full", false, "downtime: more sizes of memory and rates of writing")
	cold = flag.Bool("cold", false, "checkpoints: do not fault in the machine's memory before a sample")
)

// bench is a testbed and what was measured in it.
type bench struct {
	bed    *testbed.Testbed
	engine *engine.Engine
	bounds bounds
}

// run brings a testbed up for a benchmark's parts, and fails the benchmark
// afterwards for the bounds that they missed: results of a part that fails
// itself are not printed.
func run(b *testing.B, parts func(*bench) error) { runOn(b, testbed.Options{}, parts) }

// runOn is run on a testbed with options.
func runOn(b *testing.B, o testbed.Options, parts func(*bench) error) {
	s, err := up(b, o)
	if err == nil {
		err = parts(s)
	}
	if err != nil {
		b.Fatal(err)
	}
	for _, missed := range s.bounds {
		b.Error(missed)
	}
}

// up starts a testbed that ends with the benchmark.
func up(b *testing.B, o testbed.Options) (*bench, error) {
	_ = log.SetLevel("error") // the libraries' messages would be between the results
	p, err := parts.Find()
	if err != nil {
		return nil, err
	}
	ctx := b.Context()
	image, err := p.WorkloadImage(ctx, p.Bin("workload"), workload.Path)
	if err != nil {
		return nil, err
	}
	o.Dir, o.Kata, o.Way = p.Build("bench"), *kata, testbed.Way(*way)
	bed, release, err := testbed.UpAlone(ctx, o)
	if err != nil {
		return nil, err
	}
	b.Cleanup(func() {
		defer release()
		if err := bed.Down(context.WithoutCancel(ctx)); err != nil {
			b.Error(err)
		}
	})
	if err := bed.Import(ctx, image); err != nil {
		return nil, err
	}
	c, err := bed.Client()
	if err != nil {
		return nil, err
	}
	b.Cleanup(func() { c.Close() })
	describe(bed)
	return &bench{
		bed:    bed,
		engine: &engine.Engine{Client: c, Runtime: testbed.Runtime, FIFOs: filepath.Join(bed.Dir, "tmp/fifos")},
	}, nil
}

// describe prints what is measured on, in benchstat's format.
func describe(bed *testbed.Testbed) {
	var settings vmm.Settings
	if data, err := os.ReadFile(filepath.Join(bed.Dir, "bin/testbed-vmm.json")); err == nil {
		_ = json.Unmarshal(data, &settings)
	}
	kata := "stand-in"
	if bed.Kata != "" {
		kata = bed.Kata
	}
	fmt.Printf("accel: %s\nkata: %s\nway: %s\n", settings.Accel, kata, bed.Way)
}

// start creates and starts a container of the workload, and waits until it has
// completed a few rounds.
func (s *bench) start(ctx context.Context, id string, args ...string) (*engine.Run, error) {
	return s.startOn(ctx, nil, id, args...)
}

// startOn starts a container with mounts beside the usual ones.
func (s *bench) startOn(ctx context.Context, mounts []specs.Mount, id string, args ...string) (*engine.Run, error) {
	container, err := s.engine.Create(ctx, engine.Container{ID: id, Image: parts.WorkloadImageName, Args: append([]string{workload.Path}, args...), Mounts: mounts})
	if err != nil {
		return nil, err
	}
	run, err := s.engine.Start(ctx, container)
	if err != nil {
		return nil, err
	}
	return run, settled(ctx, run)
}

func settled(ctx context.Context, run *engine.Run) error {
	const few = 2
	return run.Output.Wait(ctx, func(lines []string) (bool, error) {
		rounds, err := workload.Rounds(lines)
		return len(rounds) >= few, err
	})
}

// bounds are the bounds that were missed.
type bounds []string

// check reports a value that should not be greater than its bound.
func (m *bounds) check(b interface {
	Name() string
	ReportMetric(value float64, unit string)
}, value float64, unit string, bound float64) {
	b.ReportMetric(value, unit)
	if value > bound {
		*m = append(*m, fmt.Sprintf("%s: %.2f %s, over the bound of %.2f", b.Name(), value, unit, bound))
	}
}

func median[T time.Duration | float64](values []T) T {
	if len(values) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(values))
	return (sorted[(len(sorted)-1)/2] + sorted[len(sorted)/2]) / 2
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// ratio is the median of the ratios of pairs that were measured one right after
// the other: what else loads the machine, and how fast it is then, affects both.
func ratio(a, b []time.Duration) float64 {
	ratios := make([]float64, len(a))
	for i := range a {
		ratios[i] = float64(a[i]) / float64(b[i])
	}
	return median(ratios)
}

// ofMedians is the ratio of the medians of what was measured apart.
func ofMedians(a, b []time.Duration) float64 { return float64(median(a)) / float64(median(b)) }

func TestMedian(t *testing.T) {
	for want, values := range map[time.Duration][]time.Duration{0: nil, 3: {9, 1, 3}, 4: {9, 3, 5, 1}} {
		if have := median(values); have != want {
			t.Errorf("median of %v is %d, want %d", values, have, want)
		}
	}
}

func TestRatioIsOfPairs(t *testing.T) {
	// The machine was half as fast in the last two.
	a, b := []time.Duration{11, 11, 24, 22}, []time.Duration{10, 10, 20, 20}
	if have := ratio(a, b); have != 1.1 {
		t.Errorf("ratio is %v", have)
	}
	if have := ofMedians([]time.Duration{3, 4, 5}, []time.Duration{1, 2}); have != 4 {
		t.Errorf("ratio of the medians is %v", have)
	}
}

type metrics map[string]float64

func (metrics) Name() string                              { return "Benchmark" }
func (m metrics) ReportMetric(value float64, unit string) { m[unit] = value }

func TestMissedBoundsAreNamed(t *testing.T) {
	var missed bounds
	m := metrics{}
	missed.check(m, 1.10, "kept/x", 1.10)
	missed.check(m, 1.20, "slow/x", 1.10)
	if len(missed) != 1 || !strings.Contains(missed[0], "1.20 slow/x") {
		t.Errorf("missed bounds: %q", missed)
	}
	if m["kept/x"] != 1.10 || m["slow/x"] != 1.20 {
		t.Errorf("reported %v", m)
	}
}
