package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/typeurl/v2"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/parts"
	"github.com/kata-checkpoint/kata-checkpoint/integration/testbed"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// execBound is how many times as long an exec into a restored container may take as one into the container that it is a
// copy of.
const execBound = 1.75

// execs compares execs into a container with execs into its restored copy, where the command has to be brought to the restored processes, in turns.
func (b *bench) execs(ctx context.Context) error {
	const id, restoredID = "exec", "exec-restored"
	args := []string{"memory", "--mib", "1", "--shm-mib", "0", "--every", "1s"}
	run, err := b.start(ctx, id, args...)
	if err != nil {
		return err
	}
	dir := filepath.Join(b.bed.Dir, "tmp/exec")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	if err := b.engine.CheckpointTo(ctx, run, dir, false); err != nil {
		return err
	}
	container, err := b.engine.Create(ctx, engine.Container{ID: restoredID, Image: parts.WorkloadImageName, Args: append([]string{workload.Path}, args...)})
	if err != nil {
		return err
	}
	restored, err := b.engine.Restore(ctx, container, dir)
	if err != nil {
		return err
	}
	if err := settled(ctx, restored); err != nil {
		return err
	}
	times, err := b.execTimes(ctx, run, restored)
	if err != nil {
		return err
	}
	t := b.table
	t.heading("exec into a restored container, and into the one that it is a copy of")
	t.row("exec, start and delete", "%.0f ms restored, %.0f ms the other, %d each", milliseconds(median(times[1])), milliseconds(median(times[0])), execCalls)
	t.row("the fastest", "%.0f ms restored, %.0f ms the other", milliseconds(slices.Min(times[1])), milliseconds(slices.Min(times[0])))
	// Of pairs: what else loads the machine changes, and affects both of a pair.
	ratios := make([]float64, execCalls)
	for i := range ratios {
		ratios[i] = float64(times[1][i]) / float64(times[0][i])
	}
	t.bounded("restored over the other, median of the pairs", "%.2f", median(ratios), execBound)
	if err := b.engine.Remove(ctx, restoredID); err != nil {
		return err
	}
	return b.engine.Remove(ctx, id)
}

// execTimes gives the times of execs into containers, in turns, of which every other begins with the last container.
func (b *bench) execTimes(ctx context.Context, runs ...*engine.Run) ([][]time.Duration, error) {
	calls := namespaces.WithNamespace(ctx, testbed.Namespace)
	times := make([][]time.Duration, len(runs))
	clients := make([]*shimClient, len(runs))
	processes := make([]typeurl.Any, len(runs))
	for i, run := range runs {
		through, past, err := b.shims(run.ID())
		if err != nil {
			return nil, err
		}
		defer through.conn.Close()
		past.conn.Close()
		clients[i] = through
		if processes[i], err = trueProcess(ctx, run); err != nil {
			return nil, err
		}
	}
	order := make([]int, len(runs))
	for i := range order {
		order[i] = i
	}
	for n := range execCalls {
		for _, i := range order {
			d, err := execOnce(calls, clients[i], runs[i].ID(), fmt.Sprintf("exec-%d", n), processes[i])
			if err != nil {
				return nil, err
			}
			times[i] = append(times[i], d)
		}
		slices.Reverse(order)
	}
	return times, nil
}
