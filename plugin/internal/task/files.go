// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
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

// filesLost reports whether the VM has lost its files.
func (s *Service) filesLost() bool { return s.files.Err() != nil && s.base.Err() == nil }

// endIfStuck ends a VM that has lost its files if what Kata was asked for is not
// done in time: nothing else can end it then.
func (s *Service) endIfStuck(ctx context.Context, what string, done func() bool) {
	if !s.filesLost() {
		return
	}
	s.background(func(base context.Context) {
		select {
		case <-time.After(stuckGrace):
		case <-base.Done():
			return
		}
		if done() {
			return
		}
		log.G(ctx).WithError(errFilesLost).WithField("call", what).Warn("ending the VM")
		if err := s.endKata(); err != nil {
			log.G(ctx).WithError(err).Error("failed to end a VM that has lost its files")
		}
	})
}

// ends reports whether a Kill is the end of the container.
func ends(r *task.KillRequest) bool {
	return r.Signal == uint32(syscall.SIGKILL) && r.ExecID == ""
}
