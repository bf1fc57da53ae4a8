// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"math"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/testbed"
)

// bootTime is how long a VM takes to start on a machine where the limits of the
// scenarios are ample as they are written: two cores, without KVM.
const bootTime = 4 * time.Second

// pace holds by what factor this machine is slower than that, as float64 bits:
// the slowest start of a VM in this run counts.
var pace atomic.Uint64

// paced gives the limit for this machine. No limit tests how fast something is:
// each is many times what is needed, and ends what hangs.
func paced(limit time.Duration) time.Duration {
	return time.Duration(float64(limit) * max(1, math.Float64frombits(pace.Load())))
}

// observe notes how long a VM took to start.
func observe(took time.Duration) {
	now := float64(took) / float64(bootTime)
	for {
		old := pace.Load()
		if now <= math.Float64frombits(old) || pace.CompareAndSwap(old, math.Float64bits(now)) {
			return
		}
	}
}

// observeBoot starts a VM and removes it.
func observeBoot(ctx context.Context, t *testing.T, e *engine.Engine) {
	t.Helper()
	id := "pace-" + runTag
	c, err := e.Create(ctx, engine.Container{ID: id, Image: testbed.Image, Args: []string{"sleep", "1000"}})
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	run, err := e.Start(ctx, c)
	took := time.Since(start)
	if err == nil {
		_, err = run.Delete(ctx, client.WithProcessKill)
	}
	if err == nil {
		err = e.Remove(ctx, id)
	}
	if err != nil {
		t.Fatal(err)
	}
	observe(took)
	t.Logf("a VM starts in %s: limits are %.1f times what they are elsewhere", took.Round(time.Millisecond), float64(paced(time.Second))/float64(time.Second))
}

func TestPace(t *testing.T) {
	defer pace.Store(pace.Load())
	pace.Store(0)
	for _, tc := range []struct{ boot, want time.Duration }{
		{time.Second, 10 * time.Second}, {2 * bootTime, 20 * time.Second}, {3 * bootTime, 30 * time.Second}, {bootTime, 30 * time.Second},
	} {
		observe(tc.boot)
		if have := paced(10 * time.Second); have != tc.want {
			t.Errorf("after a boot of %s a limit of 10s is %s, not %s", tc.boot, have, tc.want)
		}
	}
}
