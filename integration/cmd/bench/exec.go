package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/testbed"
)

// execBound is what an exec into a restored container may take longer than one into the same container before, in milliseconds.
const execBound = 30

// execs compares execs into a container with execs into the same container after its restore, where the command has to be brought to the
// restored processes.
func (b *bench) execs(ctx context.Context) error {
	const id = "exec"
	run, err := b.start(ctx, id, "memory", "--mib", "1", "--shm-mib", "0", "--every", "1s")
	if err != nil {
		return err
	}
	before, err := b.execTimes(ctx, run)
	if err != nil {
		return err
	}
	dir := filepath.Join(b.bed.Dir, "tmp/exec")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	if err := b.engine.CheckpointTo(ctx, run, dir, true); err != nil {
		return err
	}
	if _, err := run.Exit(ctx); err != nil {
		return err
	}
	if _, err := run.Delete(ctx); err != nil {
		return err
	}
	container, err := b.engine.Client.LoadContainer(ctx, id)
	if err != nil {
		return err
	}
	if run, err = b.engine.Restore(ctx, container, dir); err != nil {
		return err
	}
	if err := settled(ctx, run); err != nil {
		return err
	}
	after, err := b.execTimes(ctx, run)
	if err != nil {
		return err
	}
	t := b.table
	t.heading("exec into a restored container")
	t.row("exec, start, end and delete", "%.0f ms, %.0f ms before the checkpoint, %d each", milliseconds(after), milliseconds(before), execCalls)
	t.bounded("longer after the restore", "%.0f ms", milliseconds(after-before), execBound)
	return b.engine.Remove(ctx, id)
}

// execTimes gives the median of an exec from its creation to its end.
func (b *bench) execTimes(ctx context.Context, run *engine.Run) (time.Duration, error) {
	process, err := trueProcess(ctx, run)
	if err != nil {
		return 0, err
	}
	through, past, err := b.shims(run.ID())
	if err != nil {
		return 0, err
	}
	defer through.conn.Close()
	defer past.conn.Close()
	ctx = namespaces.WithNamespace(ctx, testbed.Namespace)
	var times []time.Duration
	for i := range execCalls {
		start := time.Now()
		if _, err := execOnce(ctx, through, run.ID(), fmt.Sprintf("exec-%d", i), process); err != nil {
			return 0, err
		}
		times = append(times, time.Since(start))
	}
	return median(times), nil
}
