// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/parts"
	"github.com/kata-checkpoint/kata-checkpoint/integration/testbed"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// execBound is the bound of an exec into a restored container over one into the
// container that it is a copy of.
const execBound = 1.75

// BenchmarkExec compares execs into a restored container, where the command has
// to be brought to the restored processes, with execs into the original.
func BenchmarkExec(b *testing.B) {
	run(b, func(s *bench) error {
		const id, restoredID = "exec", "exec-restored"
		original, restored, err := s.pair(b.Context(), id, restoredID)
		if err != nil {
			return err
		}
		b.Run("Restored", func(b *testing.B) {
			in, into, err := s.execTimes(b, restored, original)
			if err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(float64(median(in)), "ns/op")
			b.ReportMetric(milliseconds(median(into)), "original-ms")
			ratios := make([]float64, len(in))
			for i := range ratios {
				ratios[i] = float64(in[i]) / float64(into[i])
			}
			s.bounds.check(b, median(ratios), "restored/original", execBound)
		})
		if err := s.engine.Remove(b.Context(), restoredID); err != nil {
			return err
		}
		return s.engine.Remove(b.Context(), id)
	})
}

// pair starts a container and restores a copy of it beside it.
func (s *bench) pair(ctx context.Context, id, restoredID string) (original, restored *engine.Run, err error) {
	args := []string{"memory", "--mib", "1", "--shm-mib", "0", "--every", "1s"}
	if original, err = s.start(ctx, id, args...); err != nil {
		return nil, nil, err
	}
	dir := filepath.Join(s.bed.Dir, "tmp/exec")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, nil, err
	}
	if err := s.engine.CheckpointTo(ctx, original, dir, false); err != nil {
		return nil, nil, err
	}
	container, err := s.engine.Create(ctx, engine.Container{ID: restoredID, Image: parts.WorkloadImageName, Args: append([]string{workload.Path}, args...)})
	if err != nil {
		return nil, nil, err
	}
	if restored, err = s.engine.Restore(ctx, container, dir); err != nil {
		return nil, nil, err
	}
	return original, restored, settled(ctx, restored)
}

// execTimes times execs into two containers in turns.
func (s *bench) execTimes(b *testing.B, first, second *engine.Run) (a, z []time.Duration, err error) {
	calls := namespaces.WithNamespace(b.Context(), testbed.Namespace)
	exec := map[bool]func(name string) (time.Duration, error){}
	for isSecond, run := range map[bool]*engine.Run{false: first, true: second} {
		through, past, err := s.shims(run.ID())
		if err != nil {
			return nil, nil, err
		}
		defer through.conn.Close()
		past.conn.Close()
		process, err := trueProcess(b.Context(), run)
		if err != nil {
			return nil, nil, err
		}
		exec[isSecond] = func(name string) (time.Duration, error) {
			return execOnce(calls, through, run.ID(), name, process)
		}
	}
	return inTurns(b, execCalls, func(pair int, second bool) (time.Duration, error) {
		return exec[second](fmt.Sprintf("exec-%d", pair))
	})
}
