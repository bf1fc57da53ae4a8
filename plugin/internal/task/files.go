// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"slices"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/log"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/pidfd"
)

// A VM whose virtiofsd has exited has lost its files. A process that touches one
// waits forever, cannot be killed, and keeps what it traces from ending. Kata's Go
// shim ends such a VM; its Rust shim does nothing
// (src/runtime-rs/crates/resource/src/share_fs/share_virtio_fs_standalone.rs,
// run_virtiofsd).

const (
	// endsWithVM is the time within which a VM that ends has ended once its
	// virtiofsd has.
	endsWithVM = 2 * time.Second
	// stuckGrace is how long Kata may take to end or delete a container in a VM that
	// has lost its files.
	stuckGrace = 5 * time.Second
)

var errFilesLost = errclass.Unavailable(errcode.FilesLost, "virtiofsd has exited, and with it the files of the VM are gone: end its containers and create them again")

// watchFiles waits for the exit of the VM's virtiofsd, which ends all operations.
func (s *Service) watchFiles() {
	s.background(func(ctx context.Context) {
		f, err := s.virtiofsd()
		if err != nil {
			log.L.WithError(err).Debug("failed to find the VM's virtiofsd")
		}
		if f == nil {
			return // the VMM serves the files itself
		}
		defer f.Close()
		defer context.AfterFunc(ctx, func() { f.Close() })()
		if pidfd.WaitExit(f) != nil || s.vmEnds(ctx) {
			return
		}
		log.L.WithError(errFilesLost).Error("the VM cannot continue")
		s.loseFiles(errFilesLost)
		s.endIfStuck(ctx)
	})
}

// vmEnds reports whether the VM has ended, or does soon.
func (s *Service) vmEnds(ctx context.Context) bool {
	limit := time.After(endsWithVM)
	for !s.vmEnded() {
		select {
		case <-time.After(20 * time.Millisecond):
		case <-limit:
			return false
		case <-ctx.Done():
			return true
		}
	}
	return true
}

// ending is when the end of a container was asked for.
type ending struct {
	// kill is of the last SIGKILL, deletion of a Delete that Kata has not answered.
	kill, deletion atomic.Pointer[time.Time]
}

// ask notes a request, and returns what notes its answer.
func ask(request *atomic.Pointer[time.Time]) (answered func()) {
	now := time.Now()
	request.Store(&now)
	return func() { request.Store(nil) }
}

// stuck reports whether Kata has had the time to do what it was asked to, and has
// not done it.
func (c *container) stuck(limit time.Time) bool {
	before := func(at *time.Time) bool { return at != nil && at.Before(limit) }
	return before(c.ending.deletion.Load()) || before(c.ending.kill.Load()) && !hasStopped(c.current())
}

// endIfStuck ends a VM that has lost its files once Kata cannot end or delete one
// of its containers: nothing else can.
func (s *Service) endIfStuck(ctx context.Context) {
	lost := time.Now()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		limit := time.Now().Add(-stuckGrace)
		if limit.Before(lost) || !slices.ContainsFunc(s.all(), func(c *container) bool { return c.stuck(limit) }) {
			continue
		}
		log.L.WithError(errFilesLost).Warn("Kata ends no container in the VM: ending the VM")
		if err := s.endKata(); err != nil {
			log.L.WithError(err).Error("failed to end a VM that has lost its files")
		}
		return
	}
}

// isEnd reports whether a Kill is the end of a container.
func isEnd(r *task.KillRequest) bool {
	return r.Signal == uint32(syscall.SIGKILL) && r.ExecID == ""
}
