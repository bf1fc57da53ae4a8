package task

import (
	"context"
	"testing"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v2"
)

// What Kata does when containerd dies is done, and the next containerd finds
// the container as it is.
func TestContainerdDiesWhileKataWorks(t *testing.T) {
	for method, want := range map[string]string{"Create": "CREATED", "Start": "RUNNING"} {
		t.Run(method, func(t *testing.T) {
			h := newHarness(t)
			entered, release := make(chan struct{}), make(chan struct{})
			h.kata.Before(method, func(context.Context) error {
				close(entered)
				<-release
				return nil
			})
			dir := ""
			if method == "Start" {
				dir = h.create(nil)
			} else {
				dir = h.bundle(nil)
			}
			client, answer := h.task, make(chan error, 1)
			go func() {
				var err error
				if method == "Start" {
					_, err = client.Start(t.Context(), &task.StartRequest{ID: "c1"})
				} else {
					_, err = client.Create(t.Context(), &task.CreateTaskRequest{ID: "c1", Bundle: dir})
				}
				answer <- err
			}()
			<-entered
			h.conn.Close()
			if err := <-answer; err == nil {
				t.Error("an answer without a connection")
			}
			<-time.After(20 * time.Millisecond) // the shim notices
			close(release)

			h.connect()
			eventually(t, method, func() bool { return h.status() == want })
			if method == "Create" {
				if _, err := h.task.Start(t.Context(), &task.StartRequest{ID: "c1"}); err != nil {
					t.Fatal(err)
				}
			}
			// It is one of ours, and not only Kata's.
			eventually(t, "Pause", func() bool {
				_, err := h.task.Pause(t.Context(), &task.PauseRequest{ID: "c1"})
				return err == nil
			})
			if s := h.status(); s != "PAUSED" {
				t.Errorf("it is %s", s)
			}
		})
	}
}
