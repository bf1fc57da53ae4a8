// SPDX-License-Identifier: Apache-2.0

package errclass

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
)

// What the shim makes of an error says each thing once.
func TestErrorsAreSaidOnce(t *testing.T) {
	for code, err := range map[codes.Code]error{
		codes.FailedPrecondition: fmt.Errorf("container c1: %w", Precondition("it is too late")),
		codes.DeadlineExceeded:   fmt.Errorf("container c1: %w", context.DeadlineExceeded),
		codes.Unknown:            errors.Join(errors.New("one thing"), errors.New("another")),
	} {
		got := ToRPC(err)
		if status.Code(got) != code {
			t.Errorf("%v has the code %s, not %s", err, status.Code(got), code)
		}
		if text := errgrpc.ToNative(got).Error(); text != err.Error() {
			t.Errorf("%q arrives as %q", err, text)
		}
	}
	if err := ToRPC(nil); err != nil {
		t.Error(err)
	}
}

// The answer of a peer is passed on with its details; what wraps one has the
// code of its class.
func TestStatusOfAPeer(t *testing.T) {
	peer, err := status.New(codes.Aborted, "try again").WithDetails(&emptypb.Empty{})
	if err != nil {
		t.Fatal(err)
	}
	if got := status.Convert(ToRPC(peer.Err())); got.Code() != codes.Aborted || len(got.Details()) != 1 {
		t.Errorf("passed on as %v with %d details", got, len(got.Details()))
	}
	wrapped := fmt.Errorf("kill container c1: %w", With(errdefs.ErrNotFound, peer.Err()))
	if got := status.Convert(ToRPC(wrapped)); got.Code() != codes.NotFound || got.Message() != wrapped.Error() {
		t.Errorf("a wrapped one becomes %v", got)
	}
}

// What a container has written in an error is fit for protobuf, which refuses to
// encode it otherwise, and for a terminal.
func TestForeignTextInErrors(t *testing.T) {
	foreign := "the process a\xff\x1b]0;x\a (pid 7) does\nsomething"
	for _, err := range []error{Precondition("%s", foreign), status.Error(codes.FailedPrecondition, foreign)} {
		got := status.Convert(ToRPC(err))
		if want := "the process a??]0;x? (pid 7) does\nsomething"; got.Code() != codes.FailedPrecondition || !strings.Contains(got.Message(), want) {
			t.Errorf("%v: %q", got.Code(), got.Message())
		}
		if _, err := proto.Marshal(got.Proto()); err != nil {
			t.Error(err)
		}
	}
	if got := status.Convert(ToRPC(errors.New(strings.Repeat("a", 1<<20)))); len(got.Message()) > 20000 {
		t.Errorf("a message of %d bytes", len(got.Message()))
	}
}
