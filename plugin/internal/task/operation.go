package task

import (
	"context"
	"fmt"
	"time"
)

// operation returns a context for something longer than a forwarded call: it
// ends with the caller's, with the service, and after checkpoint_timeout.
func (s *Service) operation(ctx context.Context) (context.Context, func()) {
	timeout := s.cfg.CheckpointTimeout
	s.wg.Add(1)
	s.idleTimer.Stop()
	ctx, cancel := context.WithCancelCause(ctx)
	unhook := context.AfterFunc(s.base, func() { cancel(context.Cause(s.base)) })
	ctx, cancelTimeout := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("checkpoint_timeout of %s has run out: %w", timeout, context.DeadlineExceeded))
	return ctx, func() {
		cancelTimeout()
		unhook()
		cancel(nil)
		s.idleTimer.Reset(idleDelay)
		s.wg.Done()
	}
}

// idleDelay is how long after an operation the memory goes back to the system
// that it needed: there is one shim for every pod, and most do nothing.
const idleDelay = 500 * time.Millisecond

// undo returns a context for taking back what an operation did: it does not
// end with the caller's.
func cleanupContext(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
}

// cleanupTimeout bounds each step of taking back.
const cleanupTimeout = 10 * time.Second
