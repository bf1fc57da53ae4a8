// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"sync"
)

// startBarrier holds back CloseIO until Start has returned, by exec ID, which
// is empty for init. In CloseIO Kata's Go shim holds its only lock while it
// waits for a copy that Start begins, so that closing an exec's stdin too early
// blocks the shim forever (src/runtime/pkg/containerd-shim-v2/service.go). The
// zero value is ready to use.
type startBarrier struct {
	mu  sync.Mutex
	all map[string]*pendingStart
}

type pendingStart struct {
	done    chan struct{}
	started bool
}

// expect adds a process that was created.
func (b *startBarrier) expect(exec string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.all == nil {
		b.all = make(map[string]*pendingStart)
	}
	b.all[exec] = &pendingStart{done: make(chan struct{})}
}

// done records whether a process's Start has succeeded.
func (b *startBarrier) done(exec string, started bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	p := b.all[exec]
	if p == nil {
		return
	}
	select {
	case <-p.done:
	default:
		p.started = started
		close(p.done)
	}
}

// forget removes a process that was deleted.
func (b *startBarrier) forget(exec string) {
	b.done(exec, false)
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.all, exec)
}

// wait waits for the end of a process's Start and reports whether it has
// succeeded. A process that was never added has been started.
func (b *startBarrier) wait(ctx context.Context, exec string) (bool, error) {
	b.mu.Lock()
	p := b.all[exec]
	b.mu.Unlock()
	if p == nil {
		return true, nil
	}
	select {
	case <-p.done:
		return p.started, nil
	case <-ctx.Done():
		return false, context.Cause(ctx)
	}
}
