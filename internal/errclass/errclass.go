// Package errclass gives an error a class of containerd's errdefs without the
// class's name in its message: what a user reads is one sentence, and what the
// engine gets is the gRPC code.
package errclass

import (
	"fmt"

	"github.com/containerd/errdefs"
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

// Precondition is an error of the class FailedPrecondition: the call is a good
// one, at another time or with other settings.
func Precondition(format string, args ...any) error {
	return With(errdefs.ErrFailedPrecondition, fmt.Errorf(format, args...))
}

// Invalid is an error of the class InvalidArgument: the call is no good.
func Invalid(format string, args ...any) error {
	return With(errdefs.ErrInvalidArgument, fmt.Errorf(format, args...))
}

// Unavailable is an error of the class Unavailable: something that the call
// needs is not there.
func Unavailable(format string, args ...any) error {
	return With(errdefs.ErrUnavailable, fmt.Errorf(format, args...))
}

// NotFound is an error of the class NotFound.
func NotFound(format string, args ...any) error {
	return With(errdefs.ErrNotFound, fmt.Errorf(format, args...))
}
