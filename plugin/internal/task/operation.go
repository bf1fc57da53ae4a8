// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"fmt"
	"time"

	"github.com/kata-checkpoint/kata-checkpoint/internal/budget"
)

// operation returns a context for a call that takes longer than a forwarded
// one. It is done when the caller's is, when the service stops, and after
// checkpoint_timeout. The caller must call the function at the end.
func (s *Service) operation(ctx context.Context) (context.Context, func()) {
	timeout := s.cfg.CheckpointTimeout
	s.wg.Add(1)
	s.idleTimer.Stop()
	ctx, cancel := context.WithCancelCause(ctx)
	unhook := context.AfterFunc(s.base, func() { cancel(context.Cause(s.base)) })
	ctx, cancelTimeout := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("checkpoint_timeout of %s has expired: %w", timeout, context.DeadlineExceeded))
	return ctx, func() {
		cancelTimeout()
		unhook()
		cancel(nil)
		s.idleTimer.Reset(idleDelay)
		s.wg.Done()
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
