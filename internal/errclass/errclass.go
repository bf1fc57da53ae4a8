// SPDX-License-Identifier: Apache-2.0

// Package errclass gives errors a class of containerd's errdefs without adding
// the class's name to the message, and turns errors into gRPC statuses at the
// boundary: users read one sentence, and engines get the code.
package errclass

import (
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/kata-checkpoint/kata-checkpoint/internal/text"
)

type classified struct {
	class error
	err   error
}

func (c *classified) Error() string   { return c.err.Error() }
func (c *classified) Unwrap() []error { return []error{c.class, c.err} }

// With puts an error into a class, whatever class it had.
func With(class, err error) error {
	if err == nil {
		return nil
	}
	return &classified{class: class, err: err}
}

// Precondition returns an error of the class FailedPrecondition: the call would
// be valid at another time or with other settings.
func Precondition(format string, args ...any) error {
	return With(errdefs.ErrFailedPrecondition, fmt.Errorf(format, args...))
}

// Invalid returns an error of the class InvalidArgument.
func Invalid(format string, args ...any) error {
	return With(errdefs.ErrInvalidArgument, fmt.Errorf(format, args...))
}

// Unavailable returns an error of the class Unavailable: something that the
// call needs is not there at the moment.
func Unavailable(format string, args ...any) error {
	return With(errdefs.ErrUnavailable, fmt.Errorf(format, args...))
}

// NotFound returns an error of the class NotFound.
func NotFound(format string, args ...any) error {
	return With(errdefs.ErrNotFound, fmt.Errorf(format, args...))
}

// ToRPC returns an error as a gRPC status with the code of its class. A status
// that a peer returned and that nobody wrapped stays as it is. The details that
// errgrpc would add are left out: they repeat the message for every error in
// the chain, and engines would print each of them.
//
// The message may quote names and logs that a container has written. It is made
// fit for a terminal, and for protobuf, whose encoding of an error fails with it
// and ends the whole connection.
func ToRPC(err error) error {
	if err == nil {
		return nil
	}
	if peer, ok := err.(interface{ GRPCStatus() *status.Status }); ok { // not one that was wrapped: its message lacks what the wrapping added
		st := peer.GRPCStatus()
		if text.IsLines([]byte(st.Message())) {
			return err
		}
		return status.Error(st.Code(), text.Lines(st.Message(), text.MaxError))
	}
	code := codes.Unknown
	if st, ok := status.FromError(errgrpc.ToGRPC(errdefs.Resolve(err))); ok {
		code = st.Code()
	}
	return status.Error(code, text.Lines(err.Error(), text.MaxError))
}
