package task

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
)

// gate keeps starts of execs apart from freezes: one that reaches a frozen
// container through Kata wedges Kata's shim until the thaw. Its zero value is
// open.
type execGate struct {
	mu     sync.Mutex
	inside int
	// opened is not nil while the gate is closed, and is closed when it opens.
	opened chan struct{}
	// empty is not nil while close waits for those inside.
	empty chan struct{}
}

// enter waits for an open gate, at most wait. Whoever entered leaves.
func (g *execGate) enter(ctx context.Context, wait time.Duration) error {
	deadline := time.After(wait)
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
		case <-deadline:
			return errclass.Precondition("the container has been paused for longer than exec_wait_timeout of %s", wait)
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

// close lets nobody in any more and returns when nobody is inside. After an
// error the gate is open.
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
	var err error
	select {
	case <-empty:
		return nil
	case <-time.After(wait):
		err = errclass.Unavailable("an exec that is starting did not get done within exec_wait_timeout of %s", wait)
	case <-ctx.Done():
		err = fmt.Errorf("wait for an exec that is starting: %w", context.Cause(ctx))
	}
	g.open()
	return err
}

// open lets everybody in.
func (g *execGate) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.empty = nil
	if g.opened != nil {
		close(g.opened)
		g.opened = nil
	}
}
