// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"errors"
	"syscall"
	"testing"

	"github.com/containerd/containerd/api/runtime/task/v2"
)

func TestKillBeforeStart(t *testing.T) {
	h := newHarness(t)
	h.create(nil)
	waited := make(chan error, 1)
	go func() {
		_, err := h.task.Wait(t.Context(), &task.WaitRequest{ID: "c1"})
		waited <- err
	}()
	if _, err := h.task.Kill(t.Context(), &task.KillRequest{ID: "c1", Signal: uint32(syscall.SIGKILL)}); err != nil {
		t.Fatal(err)
	}
	if got := h.status(); got != "STOPPED" {
		t.Errorf("State reports %s", got)
	}
	if err := <-waited; err != nil {
		t.Error(err)
	}
	if _, err := h.task.Delete(t.Context(), &task.DeleteRequest{ID: "c1"}); err != nil {
		t.Error(err)
	}
}

// Kata's Go shim reports an exit before the container can be deleted, and
// engines delete at once.
func TestDeleteWaitsForKatasTearDown(t *testing.T) {
	h := newHarness(t)
	h.run(nil)
	if _, err := h.task.Kill(t.Context(), &task.KillRequest{ID: "c1", Signal: uint32(syscall.SIGKILL), All: true}); err != nil {
		t.Fatal(err)
	}
	refusals := 0
	h.kata.Before("Delete", func(context.Context) error {
		if refusals == 2 {
			return nil
		}
		refusals++
		return errors.New("Container not ready or stopped, impossible to delete")
	})
	if _, err := h.task.Delete(t.Context(), &task.DeleteRequest{ID: "c1"}); err != nil || refusals != 2 {
		t.Errorf("%v after %d refusals", err, refusals)
	}
}
