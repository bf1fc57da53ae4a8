// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"testing"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v2"
)

// Kata completes what it does when containerd dies, and the next containerd
// finds the container as it is.
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
			noticed := h.connectionEnds()
			h.conn.Close()
			if err := <-answer; err == nil {
				t.Error("an answer without a connection")
			}
			<-noticed
			h.connect()
			if method == "Create" {
				h.found()
			}
			close(release)

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

// connectionEnds makes a call that bypasses the server and returns a channel
// that is closed once the shim has noticed that containerd's connection has
// ended: it closes the one to Kata then, after it has canceled the server's
// calls.
func (h *harness) connectionEnds() <-chan struct{} {
	reached, noticed := make(chan struct{}), make(chan struct{})
	h.kata.Before("Stats", func(ctx context.Context) error {
		close(reached)
		<-ctx.Done()
		close(noticed)
		return ctx.Err()
	})
	client := h.task
	go func() {
		_, _ = client.Stats(context.Background(), &task.StatsRequest{ID: "c1"}) // which ends with the connection
	}()
	<-reached
	return noticed
}

// found has the next containerd look for the container while Kata's Go shim,
// which holds its lock for as long as it creates one, answers nobody.
func (h *harness) found() {
	h.t.Helper()
	for _, call := range []string{"State", "Connect", "Pids"} {
		h.kata.Before(call, func(ctx context.Context) error {
			<-ctx.Done()
			return ctx.Err()
		})
		defer h.kata.Before(call, func(context.Context) error { return nil })
	}
	ctx, cancel := context.WithTimeout(h.t.Context(), 5*time.Second)
	defer cancel()
	if resp, err := h.task.Connect(ctx, &task.ConnectRequest{ID: "c1"}); err != nil || resp.GetTaskPid() == 0 {
		h.t.Errorf("Connect: %v, %v", resp, err)
	}
	if resp, err := h.task.Pids(ctx, &task.PidsRequest{ID: "c1"}); err != nil || len(resp.GetProcesses()) == 0 {
		h.t.Errorf("Pids: %v, %v", resp, err)
	}
	if resp, err := h.task.State(ctx, &task.StateRequest{ID: "c1"}); err != nil || resp.GetStatus() != statusCreated {
		h.t.Errorf("State: %v, %v", resp, err)
	}
}
