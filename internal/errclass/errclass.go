// SPDX-License-Identifier: Apache-2.0

// Package errclass gives errors a class of containerd's errdefs without adding
// the class's name to the message, and turns errors into gRPC statuses at the
// boundary: users read one sentence with its code (package internal/errcode),
// and engines get gRPC's.
package errclass

import (
	"context"
	"errors"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
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
// be valid at another time or with other settings. The code is that of the error
// unless one among args has its own, here and in the functions below.
func Precondition(code errcode.Code, format string, args ...any) error {
	return With(errdefs.ErrFailedPrecondition, code.Errorf(format, args...))
}

// Invalid returns an error of the class InvalidArgument.
func Invalid(code errcode.Code, format string, args ...any) error {
	return With(errdefs.ErrInvalidArgument, code.Errorf(format, args...))
}

// Unavailable returns an error of the class Unavailable: something that the
// call needs is not there at the moment.
func Unavailable(code errcode.Code, format string, args ...any) error {
	return With(errdefs.ErrUnavailable, code.Errorf(format, args...))
}

// NotFound returns an error of the class NotFound.
func NotFound(code errcode.Code, format string, args ...any) error {
	return With(errdefs.ErrNotFound, code.Errorf(format, args...))
}

// ToRPC returns an error as a gRPC status with the code of its class, and its
// errcode at the end of the message. A status that a peer returned and that
// nobody wrapped stays as it is: it is Kata's. The details that errgrpc would add
// are left out: they repeat the message for every error in the chain, and engines
// would print each of them.
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
	class := errdefs.Resolve(err)
	if st, ok := status.FromError(errgrpc.ToGRPC(class)); ok {
		code = st.Code()
	}
	sentence, number := errcode.Split(errcode.Text(err))
	if added(class) {
		sentence = strings.TrimSuffix(sentence, ": "+class.Error())
	}
	return status.Error(code, errcode.With(text.Lines(sentence, text.MaxError-maxCode), number))
}

// maxCode is more than a code and the mark of what was left out take, so that who
// receives the message does not shorten it once more.
const maxCode = 32

// FromRPC is what an error was before [ToRPC] in another program of ours, as far
// as that can be known: its class, its code, and its message without the code.
func FromRPC(err error) error {
	native := errgrpc.ToNative(err)
	if native == nil {
		return nil
	}
	sentence, code := errcode.Split(status.Convert(err).Message())
	if code == 0 {
		return native // of a program without codes
	}
	class := errdefs.Resolve(native)
	if added(class) && !strings.HasSuffix(sentence, class.Error()) {
		sentence += ": " + class.Error()
	}
	return With(class, code.Wrap(errors.New(sentence)))
}

// added reports whether a client that takes an error from a status adds the
// class's name to the message.
func added(class error) bool {
	return class == context.DeadlineExceeded || class == context.Canceled //nolint:errorlint // classes
}
