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

// shutDown ends this process when Kata's shim has ended, and with nothing else:
// containerd calls it after every Delete, and Kata stays while there are
// other containers.
func (s *Service) shutDown(ctx context.Context, r *task.ShutdownRequest) (*emptypb.Empty, error) {
	resp := &emptypb.Empty{}
	err := s.down.call(ctx, "Shutdown", r, resp)
	switch {
	case errors.Is(err, ttrpc.ErrClosed):
		// Kata's Go shim ends before it answers. It is no error to containerd,
		// to which an answer with this one would be.
	case err != nil && s.hasAbandoned.Load() && r.ID == s.sandbox:
		// Kata's Rust shim cannot remove the share of a sandbox with a container that
		// it was never asked to start, and would stay for ever
		// (src/runtime-rs/crates/resource/src/share_fs/virtio_fs_share_mount.rs).
		log.G(ctx).WithError(err).Warn("Kata's shim does not shut down and is ended")
		if err := s.endKata(); err != nil {
			return nil, fmt.Errorf("shut down: %w", err)
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
	// Before the answer: a container of the same name may be started with it.
	s.down.unlink()
	s.unlink()
	s.shutdown.Shutdown()
	return resp, nil
}

const (
	// forgetTimeout bounds what is said to the agent about a container that is
	// gone; its VM may be, too.
	forgetTimeout = time.Second
	// exitWait is how long Shutdown waits for a Kata that ends after its answer.
	exitWait = time.Second
)
