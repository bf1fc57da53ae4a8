// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func TestDumpsTakeTurns(t *testing.T) {
	for _, processors := range []uint32{1, 2, 3, 4, 100} {
		synctest.Test(t, func(t *testing.T) {
			var d dumps
			begin := time.Now()
			var ends []func()
			for range min(processors, maxDumps) {
				end, waited := d.begin(t.Context(), processors)
				if waited {
					t.Fatalf("%d of %d processors are taken, and it has waited", len(ends), processors)
				}
				ends = append(ends, end)
			}
			time.AfterFunc(3*time.Second, func() { ends[0](); ends[0]() })
			end, waited := d.begin(t.Context(), processors)
			if took := time.Since(begin); !waited && maxDumps%processors == 0 || took > 3*time.Second {
				t.Errorf("%d processors: it has begun after %s (waited: %v)", processors, took, waited)
			}
			end()
		})
	}
}

// A dump that hangs delays others for a time only, and one whose caller has given
// up leaves no place that it has not had.
func TestDumpsDoNotWaitForEver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var d dumps
		end, _ := d.begin(t.Context(), 1)
		if _, waited := d.begin(t.Context(), 0); waited {
			t.Error("it waits with an agent that does not say how many processors there are")
		}
		begin := time.Now()
		without, waited := d.begin(t.Context(), 1)
		if took := time.Since(begin); !waited || took != longestTurn {
			t.Errorf("it has begun after %s (waited: %v)", took, waited)
		}
		without()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		begin = time.Now()
		if d.begin(ctx, 1); time.Since(begin) != time.Minute/4 {
			t.Errorf("it has begun after %s of the minute that it has", time.Since(begin))
		}
		begin = time.Now()
		time.AfterFunc(time.Second, cancel)
		if d.begin(ctx, 1); time.Since(begin) != time.Second {
			t.Errorf("it has begun after %s, and its caller has given up after a second", time.Since(begin))
		}
		end()
		if _, waited := d.begin(t.Context(), 1); waited {
			t.Error("all have ended, and it has waited")
		}
	})
}

// While one container of a sandbox with one processor is dumped, another one that
// nobody has paused runs.
func TestRunsUntilItIsItsTurn(t *testing.T) {
	h := newHarness(t)
	h.run(leaveRunning)
	if _, err := h.task.Create(t.Context(), &task.CreateTaskRequest{ID: "c2", Bundle: h.bundle(func(s *specs.Spec) {
		leaveRunning(s)
		s.Annotations["io.kubernetes.cri.container-type"], s.Annotations["io.kubernetes.cri.sandbox-id"] = "container", "c1"
	})}); err != nil {
		t.Fatal(err)
	}
	if _, err := h.task.Start(t.Context(), &task.StartRequest{ID: "c2"}); err != nil {
		t.Fatal(err)
	}
	var dumping atomic.Bool
	early, second := make(chan struct{}), make(chan error, 1)
	h.guest.Before("Freeze", func(context.Context) error {
		if dumping.Load() {
			close(early)
		}
		return nil
	})
	h.guest.Before("Checkpoint", func(context.Context) error {
		if slices.Contains(h.guest.Calls(), "Checkpoint c2") {
			return nil
		}
		dumping.Store(true)
		defer dumping.Store(false)
		path := t.TempDir()
		go func() {
			_, err := h.task.Checkpoint(t.Context(), &task.CheckpointTaskRequest{ID: "c2", Path: path})
			second <- err
		}()
		eventually(t, "the second one is looked at", func() bool { return slices.Contains(h.guest.Calls(), "CheckCheckpoint c2") })
		select {
		case <-early:
			t.Error("the second one is frozen while the first one is dumped")
		case <-time.After(100 * time.Millisecond):
		}
		return nil
	})
	if err := h.checkpoint(t.TempDir(), nil); err != nil {
		t.Fatal(err)
	}
	if err := <-second; err != nil {
		t.Fatal(err)
	}
}
