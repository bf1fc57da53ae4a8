// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"testing"
	"time"
)

func TestOneOperationAtATime(t *testing.T) {
	var ops operations
	ctx, end, err := ops.begin(t.Context(), "c1", dumping)
	if err != nil {
		t.Fatal(err)
	}
	if _, other, err := ops.begin(t.Context(), "c2", change); err != nil {
		t.Error(err)
	} else {
		other()
	}
	short, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, _, err := ops.begin(short, "c1", change); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a second operation: %v", err)
	}
	if kind, busy := ops.interrupt("c1", errThawed, freezing); !busy || kind != dumping || ctx.Err() != nil {
		t.Errorf("interrupted as another kind: %v %v %v", kind, busy, ctx.Err())
	}
	if err := ops.complete(ctx, func() {}); err != nil {
		t.Error(err)
	}
	if _, busy := ops.interrupt("c1", errThawed, freezing, dumping); !busy || !errors.Is(context.Cause(ctx), errThawed) {
		t.Errorf("not interrupted: %v", context.Cause(ctx))
	}
	if err := ops.complete(ctx, func() { t.Error("completed") }); !errors.Is(err, errThawed) {
		t.Error(err)
	}
	next := make(chan error)
	go func() {
		ctx, end, err := ops.begin(t.Context(), "c1", change)
		if err == nil {
			err = ctx.Err()
			end()
		}
		next <- err
	}()
	end()
	if err := <-next; err != nil {
		t.Errorf("the next operation: %v", err)
	}
	if _, busy := ops.interrupt("c1", errThawed, change, freezing, dumping); busy {
		t.Error("an operation is left")
	}
}
