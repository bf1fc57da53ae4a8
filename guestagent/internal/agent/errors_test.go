package agent

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
)

// What the shim makes of an error says each thing once.
func TestErrorsAreSaidOnce(t *testing.T) {
	for code, err := range map[codes.Code]error{
		codes.FailedPrecondition: fmt.Errorf("container c1: %w", errclass.Precondition("it is too late")),
		codes.DeadlineExceeded:   fmt.Errorf("container c1: %w", context.DeadlineExceeded),
		codes.Unknown:            errors.Join(errors.New("one thing"), errors.New("another")),
	} {
		got := toRPC(err)
		if status.Code(got) != code {
			t.Errorf("%v has the code %s, not %s", err, status.Code(got), code)
		}
		if text := errgrpc.ToNative(got).Error(); text != err.Error() {
			t.Errorf("%q arrives as %q", err, text)
		}
	}
	if err := toRPC(nil); err != nil {
		t.Error(err)
	}
}
