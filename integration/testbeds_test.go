// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/kata-checkpoint/kata-checkpoint/integration/cri"
	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/parts"
	"github.com/kata-checkpoint/kata-checkpoint/integration/testbed"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// keepEnv leaves the testbed of a failed scenario up, containers included, for
// a look at it by hand.
const keepEnv = "TESTBED_KEEP"

// sharedTestbed is a testbed that the scenarios of one variant share.
type sharedTestbed struct {
	*testbed.Testbed
	engine *engine.Engine
	cri    *cri.Client // where there are pods
	ids    []string    // of all containers so far
}

// testbeds makes testbeds when they are first needed and takes them down in the
// end. Each serves one scenario at a time, see [turns].
type testbeds struct {
	parts *parts.Parts
	dir   string

	mu   sync.Mutex
	up   map[variant]*sharedTestbed
	keep bool
	boot sync.Once
}

func newTestbeds(t *testing.T) *testbeds {
	t.Helper()
	p, err := parts.Find()
	if err != nil {
		t.Fatal(err)
	}
	// Not t.TempDir, which would remove what is mounted in a testbed that could
	// not be taken down.
	dir, err := os.MkdirTemp("/var/tmp", "kata-checkpoint-")
	if err != nil {
		t.Fatal(err)
	}
	b := &testbeds{parts: p, dir: dir, up: map[variant]*sharedTestbed{}}
	t.Cleanup(func() {
		for v := range b.up {
			b.down(t, v)
		}
		if err := os.Remove(dir); err != nil && !b.keep {
			t.Errorf("testbeds left files: %v", err)
		}
	})
	return b
}

// get returns the variant's testbed. Others are made meanwhile: a program for
// one may have to be built first, which takes minutes.
func (b *testbeds) get(t *testing.T, v variant) *sharedTestbed {
	t.Helper()
	b.mu.Lock()
	bed := b.up[v]
	b.mu.Unlock()
	if bed != nil {
		return bed
	}
	ctx := t.Context()
	image, err := b.parts.WorkloadImage(ctx, b.parts.Bin("workload"), workload.Path)
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	tb, err := testbed.Up(ctx, testbed.Options{
		Dir: filepath.Join(b.dir, v.name()), Kata: v.kata, Way: v.way, GuestMounts: v.guestMounts, Containerd: v.containerd, CRI: v.cri,
	})
	if err != nil {
		t.Fatal(err)
	}
	client, err := tb.Client()
	if err != nil {
		t.Fatal(err)
	}
	bed = &sharedTestbed{Testbed: tb, engine: &engine.Engine{Client: client, Runtime: testbed.Runtime, FIFOs: filepath.Join(tb.Dir, "tmp/fifos")}}
	b.mu.Lock()
	b.up[v] = bed
	b.mu.Unlock()
	if v.cri {
		if bed.cri, err = cri.Dial(tb.Address, testbed.Handler, filepath.Join(tb.Dir, "log/pods")); err != nil {
			t.Fatal(err)
		}
		if err := bed.cri.Ready(ctx); err != nil {
			t.Fatal(err)
		}
	}
	if err := tb.Import(ctx, image); err != nil {
		t.Fatal(err)
	}
	t.Logf("testbed %s is up after %s", v.name(), time.Since(start).Round(time.Millisecond))
	b.boot.Do(func() { observeBoot(ctx, t, bed.engine) })
	return bed
}

// leave leaves the variant's testbed up, for people.
func (b *testbeds) leave(v variant) {
	b.take(v)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.keep = true
}

// take hands the variant's testbed to whoever takes it down.
func (b *testbeds) take(v variant) *sharedTestbed {
	b.mu.Lock()
	defer b.mu.Unlock()
	bed := b.up[v]
	delete(b.up, v)
	return bed
}

// down takes the variant's testbed down and checks that it is gone.
func (b *testbeds) down(t *testing.T, v variant) {
	t.Helper()
	bed := b.take(v)
	bed.engine.Client.Close()
	if bed.cri != nil {
		bed.cri.Close()
	}
	ctx, cancel := context.WithTimeout(context.Background(), paced(time.Minute))
	defer cancel()
	if err := bed.Down(ctx); err != nil {
		t.Errorf("take down %s: %v", v.name(), err)
	}
	left, err := bed.Residue(bed.ids...)
	if err != nil {
		t.Error(err)
	}
	for _, what := range left {
		t.Errorf("testbed %s is down and left %s", v.name(), what)
	}
}
