// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/kata"
)

// downstream is Kata's task service.
type downstream struct {
	client  *ttrpc.Client
	service string
	// gone is closed when the connection has ended: Kata's shim has exited.
	gone chan struct{}
	path string

	unlinkOnce sync.Once
}

func dialDownstream(ctx context.Context, e kata.Endpoint) (*downstream, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", e.Path())
	if err != nil {
		return nil, fmt.Errorf("connect to Kata's shim: %w", err)
	}
	d := &downstream{service: e.Service(), gone: make(chan struct{}), path: e.Path()}
	d.client = ttrpc.NewClient(conn, ttrpc.WithOnClose(func() { close(d.gone) }))
	return d, nil
}

// unlinkTimeout bounds the time from the end of Kata's connections until nobody
// listens on its socket.
const unlinkTimeout = 500 * time.Millisecond

// unlink removes the socket of a Kata shim that has exited. The Rust shim
// leaves it behind, and does not start for a sandbox of the same name while it
// exists (src/runtime-rs/crates/shim/src/shim_start.rs).
func (d *downstream) unlink() {
	d.unlinkOnce.Do(func() {
		for limit := time.Now().Add(unlinkTimeout); time.Now().Before(limit); {
			conn, err := net.Dial("unix", d.path)
			if errors.Is(err, syscall.ECONNREFUSED) {
				os.Remove(d.path)
			}
			if err != nil {
				return
			}
			conn.Close()
			time.Sleep(5 * time.Millisecond) //nolint:forbidigo // the pause between two checks
		}
	})
}

const (
	// tearingDown is the answer of Kata's Go shim to the Delete of a container
	// whose exit it has reported and which it has not yet removed from the guest:
	// since 4.1 it reports first (src/runtime/pkg/containerd-shim-v2/wait.go,
	// src/runtime/virtcontainers/container.go). Engines delete right after the
	// exit, and only once.
	tearingDown = "Container not ready or stopped, impossible to delete"
	// tearDownLimit bounds how long such a Delete is retried.
	tearDownLimit = 10 * time.Second
)

// ended reports whether Kata's shim has exited.
func (d *downstream) ended() bool {
	select {
	case <-d.gone:
		return true
	default:
		return false
	}
}

// call makes one call, with the metadata and the deadline of ctx. Kata's error
// is returned unchanged.
func (d *downstream) call(ctx context.Context, method string, req, resp proto.Message) error {
	limit := time.Now().Add(tearDownLimit)
	for pause := 5 * time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		err := d.client.Call(ctx, d.service, method, req, resp)
		if err == nil || method != "Delete" || !strings.Contains(err.Error(), tearingDown) || time.Now().After(limit) {
			return err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return err
		}
	}
}

// errKataGone means that the connection to Kata's shim has ended.
var errKataGone = errclass.Unavailable(errcode.KataExited, "Kata's shim has exited")

// callNative makes a call on behalf of this shim. Its error has a class and is
// to be wrapped.
func (d *downstream) callNative(ctx context.Context, method string, req, resp proto.Message) error {
	err := d.call(ctx, method, req, resp)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, ttrpc.ErrClosed):
		return errKataGone
	case ctx.Err() != nil:
		return context.Cause(ctx)
	}
	return errgrpc.ToNative(err)
}

func (d *downstream) state(ctx context.Context, id string) (*task.StateResponse, error) {
	resp := &task.StateResponse{}
	if err := d.callNative(ctx, "State", &task.StateRequest{ID: id}, resp); err != nil {
		return nil, fmt.Errorf("state of container %s: %w", id, err)
	}
	return resp, nil
}

func (d *downstream) kill(ctx context.Context, r *task.KillRequest) error {
	return d.callNative(ctx, "Kill", r, &emptypb.Empty{})
}

// forward forwards a call to Kata. If Kata's shim dies, it does not return
// before the connection to containerd has ended as well: by that containerd
// recognizes a dead shim, whereas an error is an answer of a live one
// (core/runtime/v2/shim.go, delete).
func (s *Service) forward(ctx context.Context, method string, req, resp proto.Message) error {
	err := s.down.call(ctx, method, req, resp)
	if err != nil && errors.Is(err, ttrpc.ErrClosed) {
		<-ctx.Done()
		return errKataGone
	}
	return err
}

// forwardDetached is forward for calls that Kata completes whether or not
// anybody waits, because ttrpc cannot cancel them. So that the outcome is known
// even if containerd is killed meanwhile, it keeps the caller's deadline but
// ignores its cancellation.
func (s *Service) forwardDetached(ctx context.Context, method string, req, resp proto.Message) error {
	kctx, cancel := withoutCancel(ctx)
	defer cancel()
	err := s.down.call(kctx, method, req, resp)
	if err != nil && errors.Is(err, ttrpc.ErrClosed) {
		<-ctx.Done()
		return errKataGone
	}
	return err
}

// forwardEmpty is forward for a call with an empty response.
func (s *Service) forwardEmpty(ctx context.Context, method string, req proto.Message) (*emptypb.Empty, error) {
	resp := &emptypb.Empty{}
	return resp, s.forward(ctx, method, req, resp)
}

// isGone reports whether an error means that there is nothing left to act on.
func isGone(err error) bool {
	return errdefs.IsNotFound(err) || errors.Is(err, errKataGone)
}
