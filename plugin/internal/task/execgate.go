// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
)

// execGate keeps the start of an exec and a freeze from overlapping: an exec
// that reaches a frozen container blocks Kata's shim until the thaw. The zero
// value is open.
type execGate struct {
	mu     sync.Mutex
	inside int
	// opened is non-nil while the gate is closed. It is closed when the gate
	// opens.
	opened chan struct{}
	// empty is non-nil while close waits for those inside. It is closed by the
	// last of them.
	empty chan struct{}
}

// enter waits up to wait until the gate is open. A caller that has entered must
// leave.
func (g *execGate) enter(ctx context.Context, wait time.Duration) error {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	for {
		g.mu.Lock()
		opened := g.opened
		if opened == nil {
			g.inside++
			g.mu.Unlock()
			return nil
		}
		g.mu.Unlock()
		select {
		case <-opened:
		case <-timer.C:
			return errclass.Precondition(errcode.PausedTooLong, "the container has been paused for longer than exec_wait_timeout of %s", wait)
		case <-ctx.Done():
			return fmt.Errorf("the container is paused: %w", context.Cause(ctx))
		}
	}
}

func (g *execGate) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.inside--; g.inside == 0 && g.empty != nil {
		close(g.empty)
		g.empty = nil
	}
}

// close closes the gate and waits up to wait until nobody is inside. If it
// returns an error, the gate is open.
func (g *execGate) close(ctx context.Context, wait time.Duration) error {
	g.mu.Lock()
	if g.opened == nil {
		g.opened = make(chan struct{})
	}
	if g.inside == 0 {
		g.mu.Unlock()
		return nil
	}
	empty := make(chan struct{})
	g.empty = empty
	g.mu.Unlock()
	timer := time.NewTimer(wait)
	defer timer.Stop()
	var err error
	select {
	case <-empty:
		return nil
	case <-timer.C:
		err = errclass.Unavailable(errcode.ExecStarting, "an exec that is being started has not started within exec_wait_timeout of %s", wait)
	case <-ctx.Done():
		err = fmt.Errorf("wait for an exec that is being started: %w", context.Cause(ctx))
	}
	g.open()
	return err
}

// open opens the gate.
func (g *execGate) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.empty = nil
	if g.opened != nil {
		close(g.opened)
		g.opened = nil
	}
}
