// SPDX-License-Identifier: Apache-2.0

package errclass

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
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
