// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"sync"
	"time"

	"github.com/kata-checkpoint/kata-checkpoint/internal/budget"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
)

// inProgress counts what the service waits for when it stops.
type inProgress struct {
	mu       sync.Mutex
	stopping bool
	wg       sync.WaitGroup
}

// enter reports whether something may begin, which then calls leave at its end:
// nothing may once the service waits.
func (p *inProgress) enter() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stopping {
		return false
	}
	p.wg.Add(1)
	return true
}

func (p *inProgress) leave() { p.wg.Done() }

// wait waits for all that has begun. Nothing begins any more.
func (p *inProgress) wait() {
	p.mu.Lock()
	p.stopping = true
	p.mu.Unlock()
	p.wg.Wait()
}

// background runs a function that the service waits for when it stops, which is
// when its context is done. It reports whether it does: not once the service
// stops.
func (s *Service) background(f func(context.Context)) bool {
	if !s.operations.enter() {
		return false
	}
	go func() {
		defer s.operations.leave()
		f(s.base)
	}()
	return true
}

// operation returns a context for a call that takes longer than a forwarded
// one. It is done when the caller's is, when the service stops, when the VM has lost
// its files, and after checkpoint_timeout. The caller must call the function at the end.
func (s *Service) operation(ctx context.Context) (context.Context, func()) {
	timeout := s.cfg.CheckpointTimeout
	ctx, cancel := context.WithCancelCause(ctx)
	if !s.operations.enter() {
		cancel(context.Cause(s.base))
		return ctx, func() {}
	}
	s.idleTimer.Stop()
	unhook := context.AfterFunc(s.files, func() { cancel(context.Cause(s.files)) })
	ctx, cancelTimeout := context.WithTimeoutCause(ctx, timeout, errcode.CheckpointLate.Errorf("checkpoint_timeout of %s has expired: %w", timeout, context.DeadlineExceeded))
	return ctx, func() {
		cancelTimeout()
		unhook()
		cancel(nil)
		s.idleTimer.Reset(idleDelay)
		s.operations.leave()
	}
}

// limits bound what a checkpoint or a restore takes from a guest or an archive.
func (s *Service) limits() budget.Limits {
	return budget.Limits{Files: s.cfg.MaxImageFiles, Bytes: s.cfg.MaxImageBytes, Reserve: s.cfg.ReserveBytes}
}

// idleDelay is the time from the last operation until its memory is returned to
// the OS: every pod has a shim, and most of them are idle.
const idleDelay = 500 * time.Millisecond

// cleanupContext returns a context for cleaning up after an operation. It
// outlives the caller's cancellation and is bounded by cleanupTimeout.
func cleanupContext(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
}

// cleanupTimeout bounds each step of a cleanup.
const cleanupTimeout = 10 * time.Second
