// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"errors"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v2"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
	"github.com/kata-checkpoint/kata-checkpoint/internal/config"
)

func (h *harness) resume() {
	h.t.Helper()
	if _, err := h.task.Resume(h.t.Context(), &task.ResumeRequest{ID: "c1"}); err != nil {
		h.t.Fatal(err)
	}
}

func TestPauseIsNotForwarded(t *testing.T) {
	h := newHarness(t)
	h.run(nil)
	h.pause()
	if got := h.status(); got != "PAUSED" {
		t.Errorf("paused: State reports %s", got)
	}
	st, err := h.task.State(t.Context(), &task.StateRequest{ID: "c1", ExecID: "e"})
	if err != nil || st.GetStatus() != tasktypes.Status_PAUSED {
		t.Errorf("paused: State of an exec reports %s, %v", st.GetStatus(), err)
	}
	_, err = h.task.Pause(t.Context(), &task.PauseRequest{ID: "c1"})
	wantError(t, err, "already paused")
	h.resume()
	if got := h.status(); got != "RUNNING" {
		t.Errorf("resumed: State reports %s", got)
	}
	h.resume() // of what runs: an engine may, after a checkpoint
	if h.kata.Called("Pause c1") || h.kata.Called("Resume c1") {
		t.Error("forwarded to Kata")
	}
	h.wantCalls("the agent", h.guest.Calls(), "Adopt c1", "Freeze c1", "Thaw c1")
	if got := h.events.published(); !slices.Equal(got, []string{"/tasks/paused", "/tasks/resumed"}) {
		t.Errorf("events %q", got)
	}
}

func TestResumeAfterExit(t *testing.T) {
	h := newHarness(t)
	h.run(nil)
	h.pause()
	if _, err := h.task.Kill(t.Context(), &task.KillRequest{ID: "c1", Signal: 9}); err != nil {
		t.Fatal(err)
	}
	h.events.onExit("c1", "")
	h.resume()
	if got := h.status(); got != "STOPPED" {
		t.Errorf("State reports %s", got)
	}
	h.wantCalls("the agent", h.guest.Calls(), "Adopt c1", "Freeze c1")
}

// Engines resume once.
func TestResumeWhoseCallerGivesUp(t *testing.T) {
	h := newHarness(t)
	h.run(nil)
	h.pause()
	reached := make(chan struct{})
	h.guest.Before("Thaw", func(ctx context.Context) error {
		h.guest.Before("Thaw", nil)
		close(reached)
		<-ctx.Done()
		return ctx.Err()
	})
	ctx, cancel := context.WithCancel(t.Context())
	resumed := make(chan error, 1)
	c := h.service.container("c1")
	go func() { resumed <- c.resume(ctx) }()
	<-reached
	cancel()
	if err := <-resumed; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if got := h.status(); got != "RUNNING" {
		t.Errorf("State reports %s", got)
	}
}

func TestPauseThatFailsThaws(t *testing.T) {
	h := newHarness(t)
	h.run(nil)
	h.guest.Before("Freeze", func(context.Context) error {
		return errgrpc.ToGRPCf(errdefs.ErrUnavailable, "process 7 does not stop")
	})
	_, err := h.task.Pause(t.Context(), &task.PauseRequest{ID: "c1"})
	wantError(t, err, "freeze container c1", "process 7 does not stop")
	if got := h.status(); got != "RUNNING" {
		t.Errorf("State reports %s", got)
	}
	h.wantCalls("the agent", h.guest.Calls(), "Adopt c1", "Freeze c1", "Thaw c1")
	if _, err := h.task.Start(t.Context(), &task.StartRequest{ID: "c1", ExecID: "e"}); err != nil {
		t.Errorf("exec afterwards: %v", err)
	}
}

func TestPauseRefused(t *testing.T) {
	h := newHarness(t)
	h.create(nil)
	_, err := h.task.Pause(t.Context(), &task.PauseRequest{ID: "c1"})
	wantError(t, err, "has not been started")
	if _, err := h.task.Start(t.Context(), &task.StartRequest{ID: "c1"}); err != nil {
		t.Fatal(err)
	}
	h.events.onExit("c1", "")
	_, err = h.task.Pause(t.Context(), &task.PauseRequest{ID: "c1"})
	wantError(t, err, "has stopped")
}

func TestExecWhileFrozen(t *testing.T) {
	start := func(h *harness) chan error {
		done := make(chan error, 1)
		go func() {
			_, err := h.task.Start(context.Background(), &task.StartRequest{ID: "c1", ExecID: "e"})
			done <- err
		}()
		return done
	}
	t.Run("waits for the thaw", func(t *testing.T) {
		h := newHarness(t)
		h.run(nil)
		h.pause()
		done := start(h)
		select {
		case err := <-done:
			t.Fatalf("did not wait: %v", err)
		case <-time.After(50 * time.Millisecond):
		}
		if h.kata.Called("Start c1 e") {
			t.Error("Kata was asked for an exec in a frozen container")
		}
		h.resume()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Run("fails after exec_wait_timeout", func(t *testing.T) {
		h := newHarness(t, withConfig(func(c *config.Config) { c.ExecWaitTimeout = 50 * time.Millisecond }))
		h.run(nil)
		h.pause()
		wantError(t, <-start(h), "exec e in container c1", "paused", "exec_wait_timeout")
		if h.kata.Called("Start c1 e") {
			t.Error("Kata was asked for an exec in a frozen container")
		}
	})
	t.Run("goes to Kata once the container has ended", func(t *testing.T) {
		h := newHarness(t)
		h.run(nil)
		h.pause()
		done := start(h)
		h.events.onExit("c1", "")
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Run("one that is starting ends first", func(t *testing.T) {
		h := newHarness(t)
		h.run(nil)
		reached, release := make(chan struct{}), make(chan struct{})
		h.kata.Before("Start", func(context.Context) error {
			close(reached)
			<-release
			return nil
		})
		started := start(h)
		<-reached
		paused := make(chan error, 1)
		go func() {
			_, err := h.task.Pause(context.Background(), &task.PauseRequest{ID: "c1"})
			paused <- err
		}()
		select {
		case err := <-paused:
			t.Fatalf("paused while an exec was starting: %v", err)
		case <-time.After(50 * time.Millisecond):
		}
		if slices.Contains(h.guest.Calls(), "Freeze c1") {
			t.Error("frozen while an exec was starting")
		}
		close(release)
		if err := errors.Join(<-started, <-paused); err != nil {
			t.Error(err)
		}
	})
	t.Run("one that does not start makes Pause fail", func(t *testing.T) {
		h := newHarness(t, withConfig(func(c *config.Config) { c.ExecWaitTimeout = 50 * time.Millisecond }))
		h.run(nil)
		reached, release := make(chan struct{}), make(chan struct{})
		h.kata.Before("Start", func(context.Context) error {
			close(reached)
			<-release
			return nil
		})
		started := start(h)
		<-reached
		_, err := h.task.Pause(t.Context(), &task.PauseRequest{ID: "c1"})
		wantError(t, err, "exec_wait_timeout")
		close(release)
		if err := <-started; err != nil {
			t.Error(err)
		}
		h.kata.Before("Start", nil)
		h.pause()
	})
}

func TestStateDoesNotWaitForKata(t *testing.T) {
	h := newHarness(t)
	h.run(nil)
	if got := h.status(); got != "RUNNING" {
		t.Fatal(got)
	}
	h.pause()
	release := make(chan struct{})
	defer close(release)
	h.kata.Before("State", func(context.Context) error {
		<-release
		return nil
	})
	// containerd waits for 2 s.
	if got := h.status(); got != "PAUSED" || stateTimeout > 1900*time.Millisecond {
		t.Errorf("State reports %s after %s at the latest", got, stateTimeout)
	}
}

func TestStateOfAContainerThatKataIsCreating(t *testing.T) {
	h := newHarness(t)
	h.create(nil)
	release := make(chan struct{})
	defer close(release)
	h.kata.Before("State", func(context.Context) error {
		<-release
		return nil
	})
	if got := h.status(); got != "CREATED" {
		t.Errorf("State reports %s", got)
	}
}

func TestAgentThatDiesWhileFrozen(t *testing.T) {
	h := newHarness(t)
	h.run(nil)
	h.pause()
	h.guest.SetThere(false)
	// Restarted by a bootstrap container: the guest hook runs at its
	// creation.
	h.kata.Before("Create", func(context.Context) error {
		h.guest.SetThere(true)
		return nil
	})
	eventually(t, "the new agent gets the frozen container", func() bool {
		return slices.Equal(h.guest.Calls(), []string{"Adopt c1", "Freeze c1", "Freeze c1"})
	})
	h.resume()
	if got := h.status(); got != "RUNNING" {
		t.Errorf("State reports %s", got)
	}
}

func TestPauseOfTheSandboxIsForwarded(t *testing.T) {
	h := newHarness(t)
	h.run(func(s *specs.Spec) { s.Annotations["io.kubernetes.cri.container-type"] = "sandbox" })
	h.pause()
	h.resume()
	if !h.kata.Called("Pause c1") || !h.kata.Called("Resume c1") {
		t.Error("not forwarded")
	}
	h.wantCalls("the agent", h.guest.Calls())
	_, err := h.task.Checkpoint(t.Context(), &task.CheckpointTaskRequest{ID: "c1", Path: t.TempDir()})
	wantError(t, err, "pod's sandbox")
}

func TestCloseIOWaitsForTheStart(t *testing.T) {
	h := newHarness(t)
	h.run(nil)
	if _, err := h.task.Exec(t.Context(), &task.ExecProcessRequest{ID: "c1", ExecID: "e"}); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		_, err := h.task.CloseIO(context.Background(), &task.CloseIORequest{ID: "c1", ExecID: "e", Stdin: true})
		done <- err
	}()
	select {
	case err := <-done:
		t.Fatalf("did not wait: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	if _, err := h.task.Start(t.Context(), &task.StartRequest{ID: "c1", ExecID: "e"}); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	calls := h.kata.Calls()
	if i, j := slices.Index(calls, "Start c1 e"), slices.Index(calls, "CloseIO c1 e"); i < 0 || j < i {
		t.Errorf("calls %q", calls)
	}

	h.kata.Before("Start", func(context.Context) error { return os.ErrInvalid })
	if _, err := h.task.Exec(t.Context(), &task.ExecProcessRequest{ID: "c1", ExecID: "f"}); err != nil {
		t.Fatal(err)
	}
	if _, err := h.task.Start(t.Context(), &task.StartRequest{ID: "c1", ExecID: "f"}); err == nil {
		t.Fatal("no error")
	}
	if _, err := h.task.CloseIO(t.Context(), &task.CloseIORequest{ID: "c1", ExecID: "f"}); err != nil || h.kata.Called("CloseIO c1 f") {
		t.Errorf("of an exec that could not start: %v, %q", err, h.kata.Calls())
	}
}

// CRIU is loaded into the guest behind a container's Start where its first Pause is
// not to wait for that, once all the same, and before the first Pause otherwise.
func TestCRIUIsLoadedBehindTheStart(t *testing.T) {
	for name, tc := range map[string]struct {
		prepare option
		change  func(*specs.Spec)
		want    bool
	}{
		"by default":      {prepare: withConfig(func(*config.Config) {})},
		"with load_criu":  {prepare: withConfig(func(c *config.Config) { c.LoadCRIUAtStart = true }), want: true},
		"with pre-dumps":  {prepare: withConfig(func(c *config.Config) { c.PreDumps = 1 }), want: true},
		"by a pod's wish": {prepare: withConfig(func(*config.Config) {}), change: func(s *specs.Spec) { s.Annotations[annotations.PreDumpKey] = "auto" }, want: true},
	} {
		h := newHarness(t, tc.prepare)
		h.run(tc.change)
		if tc.want {
			eventually(t, name+": CRIU is loaded", func() bool { return h.guest.Checks() > 0 })
			continue
		}
		h.pause()
		if got := h.guest.Checks(); got != 1 {
			t.Errorf("%s: CRIU was loaded %d times until the first Pause has ended", name, got)
		}
	}
}
