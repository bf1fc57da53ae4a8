// SPDX-License-Identifier: Apache-2.0

package errclass

import (
	"errors"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
)

func TestJoin(t *testing.T) {
	first, second := Precondition(errcode.Paused, "the container is paused"), errors.New("disk full")
	err := Join(nil, first, nil, second)
	if got, want := err.Error(), "the container is paused; disk full"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if !errors.Is(err, second) || !errdefs.IsFailedPrecondition(err) {
		t.Errorf("%v lost an error or its class", err)
	}
	if got := Join(nil, second); got != second { //nolint:errorlint // it is to be returned unchanged
		t.Errorf("got %v for a single error", got)
	}
	if err := Join(nil, nil); err != nil {
		t.Errorf("got %v for no error", err)
	}
}
