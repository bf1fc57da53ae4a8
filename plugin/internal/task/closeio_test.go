// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"testing"

	"github.com/containerd/containerd/api/runtime/task/v2"
)

// As Kata's Go shim does it, CloseIO ends only when the client has closed its
// own end, and the client, as ctr is, waits for the answer before it does.
func TestCloseIOIsAnsweredBeforeTheClientCloses(t *testing.T) {
	h := newHarness(t)
	h.run(nil)
	closed, ended := make(chan struct{}), make(chan struct{})
	h.kata.Before("CloseIO", func(ctx context.Context) error {
		defer close(ended)
		select {
		case <-closed:
			return nil
		case <-ctx.Done():
			t.Error("the call to Kata ended with the client's")
			return ctx.Err()
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), waitLimit)
	defer cancel()
	if _, err := h.task.CloseIO(ctx, &task.CloseIORequest{ID: "c1", Stdin: true}); err != nil {
		t.Error(err)
	}
	close(closed)
	<-ended
}
