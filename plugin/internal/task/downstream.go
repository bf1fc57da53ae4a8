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
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/kata"
)

// downstream is Kata's task service.
type downstream struct {
	client  *ttrpc.Client
	service string
	// gone is closed when the connection has ended, which is when Kata's shim has.
	gone chan struct{}
	path string

	unlinkOnce sync.Once
}

func dialDownstream(ctx context.Context, e kata.Endpoint) (*downstream, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", e.Path())
	if err != nil {
		return nil, fmt.Errorf("reach Kata's shim: %w", err)
	}
	d := &downstream{service: e.Service(), gone: make(chan struct{}), path: e.Path()}
	d.client = ttrpc.NewClient(conn, ttrpc.WithOnClose(func() { close(d.gone) }))
	return d, nil
}

// unlinkTimeout bounds the time from the end of Kata's connections to the end
// of its socket.
const unlinkTimeout = 500 * time.Millisecond

// unlink removes the socket of a Kata that has ended. Its Rust shim leaves it,
// and does not start again under the same name while it is there
// (src/runtime-rs/crates/shim/src/shim_start.rs).
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
			<-time.After(5 * time.Millisecond)
		}
	})
}

const (
	// tearingDown is what Kata's Go shim answers to the Delete of a container
	// whose exit it has told and which it is still taking out of the guest:
	// since 4.1 it tells first (src/runtime/pkg/containerd-shim-v2/wait.go,
	// src/runtime/virtcontainers/container.go). Engines delete right after the
	// exit, and once.
	tearingDown = "Container not ready or stopped, impossible to delete"
	// tearDownLimit bounds how long a Delete waits for that.
	tearDownLimit = 10 * time.Second
)

// ended says whether Kata's shim has.
func (d *downstream) ended() bool {
	select {
	case <-d.gone:
		return true
	default:
		return false
	}
}

// call makes one call. Metadata and deadline of ctx go along; an answer's
// error is returned as it came.
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

// errKataGone says that the connection to Kata's shim has ended.
var errKataGone = errclass.Unavailable("the shim of Kata has ended")

// own makes a call for a purpose of our own; its error is to be wrapped.
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

// pass forwards a call. When Kata's shim dies meanwhile it does not return
// before the connection to containerd ends, too: that is what containerd takes
// for a dead shim, an error it takes for an answer
// (core/runtime/v2/shim.go, delete).
func (s *Service) forward(ctx context.Context, method string, req, resp proto.Message) error {
	err := s.down.call(ctx, method, req, resp)
	if err != nil && errors.Is(err, ttrpc.ErrClosed) {
		<-ctx.Done()
		return errKataGone
	}
	return err
}

// passToEnd is pass for what Kata does to the end whether or not anybody waits:
// ttrpc cannot call it off. So that we know what there is when containerd was
// killed meanwhile, it ends with its caller's deadline, and not with its caller.
func (s *Service) forwardDetached(ctx context.Context, method string, req, resp proto.Message) error {
	kctx, cancel := context.WithoutCancel(ctx), func() {}
	if limit, ok := ctx.Deadline(); ok {
		kctx, cancel = context.WithDeadline(kctx, limit)
	}
	defer cancel()
	err := s.down.call(kctx, method, req, resp)
	if err != nil && errors.Is(err, ttrpc.ErrClosed) {
		<-ctx.Done()
		return errKataGone
	}
	return err
}

// passEmpty is pass for a call whose answer says nothing.
func (s *Service) forwardEmpty(ctx context.Context, method string, req proto.Message) (*emptypb.Empty, error) {
	resp := &emptypb.Empty{}
	return resp, s.forward(ctx, method, req, resp)
}

// isGone says whether an error means that there is nothing left to act on.
func isGone(err error) bool {
	return errdefs.IsNotFound(err) || errors.Is(err, errKataGone)
}
