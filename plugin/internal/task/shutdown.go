// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/types/known/emptypb"
)

// exitWait is how long Shutdown waits for Kata's shim to exit after its answer.
const exitWait = time.Second

// shutDown ends this process if Kata's shim has exited, and only then:
// containerd calls it after every Delete, and Kata's shim remains while there
// are other containers.
func (s *Service) shutDown(ctx context.Context, r *task.ShutdownRequest) (*emptypb.Empty, error) {
	resp := &emptypb.Empty{}
	err := s.down.call(ctx, "Shutdown", r, resp)
	switch {
	case errors.Is(err, ttrpc.ErrClosed):
		// Kata's Go shim exits before it answers, which is a success.
	case err != nil && s.hasAbandoned.Load() && r.ID == s.sandbox:
		// Kata's Rust shim cannot remove the share of a sandbox with a container that
		// was never started, and would never exit
		// (src/runtime-rs/crates/resource/src/share_fs/virtio_fs_share_mount.rs).
		log.G(ctx).WithError(err).Warn("Kata's shim failed to shut down, killing it")
		if err := s.endKata(); err != nil {
			return nil, fmt.Errorf("kill Kata's shim: %w", err)
		}
		select {
		case <-s.down.gone:
		case <-time.After(exitWait):
		}
	case err != nil:
		return nil, err
	case r.Now || r.ID == s.sandbox:
		select {
		case <-s.down.gone:
		case <-time.After(exitWait):
			return resp, nil
		}
	default:
		return resp, nil
	}
	// Before the answer, because a container of the same name may be started then.
	s.down.unlink()
	s.unlink()
	s.shutdown.Shutdown()
	return resp, nil
}
