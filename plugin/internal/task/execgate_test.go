// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
)

// closed returns a closed gate.
func closed(t *testing.T) *execGate {
	t.Helper()
	g := &execGate{}
	if err := g.close(t.Context(), time.Second); err != nil {
		t.Fatal(err)
	}
	return g
}

// flash opens and closes a gate before anybody who waits can enter.
func (g *execGate) flash() {
	g.mu.Lock()
	defer g.mu.Unlock()
	close(g.opened)
	g.opened = make(chan struct{})
}

// The wait for a gate has one limit, however often the gate opens for too short.
func TestAGateThatOpensForShortDoesNotProlongTheWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := closed(t)
		begin, entered := time.Now(), make(chan error, 1)
		go func() { entered <- g.enter(t.Context(), 10*time.Second) }()
		tick := time.NewTicker(3 * time.Second)
		defer tick.Stop()
		for range 10 {
			select {
			case err := <-entered:
				wantError(t, err, "paused for longer than exec_wait_timeout of 10s")
				if took := time.Since(begin); took != 10*time.Second {
					t.Errorf("the wait ended after %s", took)
				}
				return
			case <-tick.C:
				g.flash()
				synctest.Wait()
			}
		}
		g.open()
		t.Fatalf("the wait has not ended after %s: %v", time.Since(begin), <-entered)
	})
}

// A caller that has given up neither enters nor keeps the gate from closing.
func TestTheWaitForAGateEndsWithItsCaller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := closed(t)
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		begin := time.Now()
		wantError(t, g.enter(ctx, time.Hour), "the container is paused")
		if took := time.Since(begin); took != 2*time.Second {
			t.Errorf("the wait ended after %s", took)
		}
		g.open()
		if err := g.close(t.Context(), time.Hour); err != nil || time.Since(begin) != 2*time.Second {
			t.Errorf("closing waited until %s: %v", time.Since(begin), err)
		}
	})
}
