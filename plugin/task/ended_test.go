package task

import (
	"syscall"
	"testing"

	"github.com/containerd/containerd/api/runtime/task/v2"
)

func TestKillOfWhatHasNotStartedEndsIt(t *testing.T) {
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
		t.Errorf("State says %s", got)
	}
	if err := <-waited; err != nil {
		t.Error(err)
	}
	if _, err := h.task.Delete(t.Context(), &task.DeleteRequest{ID: "c1"}); err != nil {
		t.Error(err)
	}
}
