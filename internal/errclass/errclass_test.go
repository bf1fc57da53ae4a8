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

	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/text"
)

// What the shim makes of an error says each thing once, and has its code in the
// end. Another program of ours gets back the error that it was.
func TestErrorsAreSaidOnce(t *testing.T) {
	for code, tc := range map[codes.Code]struct {
		err  error
		code errcode.Code
	}{
		codes.FailedPrecondition: {fmt.Errorf("container c1: %w", Precondition(errcode.Busy, "it is too late")), errcode.Busy},
		codes.DeadlineExceeded:   {fmt.Errorf("container c1: %w", context.DeadlineExceeded), errcode.Timeout},
		codes.Unknown:            {errors.Join(errors.New("one thing"), errors.New("another")), errcode.Failed},
	} {
		got := ToRPC(tc.err)
		if status.Code(got) != code {
			t.Errorf("%v has the code %s, not %s", tc.err, status.Code(got), code)
		}
		text, want := errgrpc.ToNative(got).Error(), fmt.Sprintf("%v (%v)", tc.err, tc.code)
		if code == codes.DeadlineExceeded { // an engine adds this
			want = fmt.Sprintf("container c1 (%v): context deadline exceeded", tc.code)
		}
		if text != want {
			t.Errorf("%q arrives as %q", want, text)
		}
		back := FromRPC(got)
		if back.Error() != tc.err.Error() || errcode.Of(back) != tc.code || !errors.Is(back, errdefs.Resolve(tc.err)) {
			t.Errorf("%q of %v becomes %q of %v with %v", tc.err, errdefs.Resolve(tc.err), back, errdefs.Resolve(back), errcode.Of(back))
		}
		// As the shim wraps what the agent has answered.
		wrapped := ToRPC(fmt.Errorf("checkpoint: %w; see the log", back))
		if want := fmt.Sprintf("checkpoint: %v; see the log (%v)", tc.err, tc.code); status.Convert(wrapped).Message() != want || status.Code(wrapped) != code {
			t.Errorf("wrapped: %v, not %q", wrapped, want)
		}
	}
	if err := errors.Join(ToRPC(nil), FromRPC(nil)); err != nil {
		t.Error(err)
	}
	if old := FromRPC(status.Error(codes.FailedPrecondition, "of a release without codes")); errcode.Of(old) != 0 || !errdefs.IsFailedPrecondition(old) {
		t.Errorf("%v has the code %v", old, errcode.Of(old))
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
	if got := status.Convert(ToRPC(wrapped)); got.Code() != codes.NotFound || got.Message() != wrapped.Error()+" (KC-9004)" {
		t.Errorf("a wrapped one becomes %v", got)
	}
}

// What a container has written in an error is fit for protobuf, which refuses to
// encode it otherwise, and for a terminal.
func TestForeignTextInErrors(t *testing.T) {
	foreign := "the process a\xff\x1b]0;x\a (pid 7) does\nsomething"
	for _, err := range []error{Precondition(errcode.Busy, "%s", foreign), status.Error(codes.FailedPrecondition, foreign)} {
		got := status.Convert(ToRPC(err))
		if want := "the process a??]0;x? (pid 7) does\nsomething"; got.Code() != codes.FailedPrecondition || !strings.Contains(got.Message(), want) {
			t.Errorf("%v: %q", got.Code(), got.Message())
		}
		if _, err := proto.Marshal(got.Proto()); err != nil {
			t.Error(err)
		}
	}
	long := ToRPC(errcode.Busy.Wrap(errors.New(strings.Repeat("a", 1<<20))))
	if got := status.Convert(long); len(got.Message()) > text.MaxError {
		t.Errorf("a message of %d bytes", len(got.Message()))
	}
	if got := errcode.Of(FromRPC(long)); got != errcode.Busy {
		t.Errorf("the code of a long message becomes %v", got)
	}
}
