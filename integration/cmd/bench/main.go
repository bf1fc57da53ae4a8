// bench measures what checkpoints cost over what they would cost at least: the bytes that are written over the size of the image set, the time
// over a bare criu dump in the same guest, and calls and execs through the shim over those to Kata's shim itself. `make bench` runs it.
//
// All comparisons are of one run on one machine, taken in turns; the medians are shown, and whether they keep within their bounds.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/containerd/log"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/parts"
	"github.com/kata-checkpoint/kata-checkpoint/integration/testbed"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

func main() {
	var o testbed.Options
	var only string
	b := &bench{table: &table{out: os.Stdout}}
	flag.StringVar(&o.Kata, "kata", "", "`directory` with a real Kata in place of the stand-in")
	flag.StringVar((*string)(&o.Way), "way", "", "the stand-in's `way`: go (default) or rust")
	flag.StringVar(&only, "only", "", "checkpoint, calls or exec")
	flag.IntVar(&b.runs, "runs", 10, "checkpoints of each size")
	flag.BoolVar(&b.cold, "cold", false, "checkpoints: with memory as the machine has it, which may be its hypervisor's at the time")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	_ = log.SetLevel("error")
	if err := b.run(ctx, o, only); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// bench is one run of all measurements.
type bench struct {
	bed    *testbed.Testbed
	engine *engine.Engine
	table  *table
	runs   int
	cold   bool
}

func (b *bench) run(ctx context.Context, o testbed.Options, only string) (err error) {
	p, err := parts.Find()
	if err != nil {
		return err
	}
	image, err := p.WorkloadImage(ctx, p.Bin("workload"), workload.Path)
	if err != nil {
		return err
	}
	o.Dir = p.Build("bench")
	var release func()
	if b.bed, release, err = testbed.UpAlone(ctx, o); err != nil {
		return err
	}
	defer release()
	defer func() { err = errors.Join(err, b.bed.Down(context.WithoutCancel(ctx))) }()
	if err := b.bed.Import(ctx, image); err != nil {
		return err
	}
	c, err := b.bed.Client()
	if err != nil {
		return err
	}
	defer c.Close()
	b.engine = &engine.Engine{Client: c, Runtime: testbed.Runtime, FIFOs: filepath.Join(b.bed.Dir, "tmp/fifos")}
	b.table.machine(b.bed)
	for _, part := range []struct {
		name string
		run  func(context.Context) error
	}{
		{"checkpoint", b.checkpoints},
		{"calls", b.calls},
		{"exec", b.execs},
	} {
		if only != "" && only != part.name {
			continue
		}
		if err := part.run(ctx); err != nil {
			return fmt.Errorf("%s: %w", part.name, err)
		}
	}
	return b.table.verdict()
}

// start makes and starts a container of the workload, and waits until it has done a few rounds.
func (b *bench) start(ctx context.Context, id string, args ...string) (*engine.Run, error) {
	container, err := b.engine.Create(ctx, engine.Container{ID: id, Image: parts.WorkloadImageName, Args: append([]string{workload.Path}, args...)})
	if err != nil {
		return nil, err
	}
	run, err := b.engine.Start(ctx, container)
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
