// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/log"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
)

// Every transition from every state, and what it does to the exec gate.
func TestTransitions(t *testing.T) {
	names := []string{"creating", "created", "running", "paused", "checkpointing", "unmanaged", "ending", "stopped", "abandoned"}
	states := func(c *container) map[string]state {
		return map[string]state{
			"creating": creatingState{c: c, next: createdState{c: c}}, "created": createdState{c: c}, "running": runningState{c: c}, "paused": pausedState{c: c},
			"checkpointing": checkpointingState{c: c, isFrozen: true}, "unmanaged": unmanagedState{c: c}, "ending": endingState{createdState{c: c}}, "stopped": stoppedState{c: c},
			"abandoned": abandonedState{stoppedState: stoppedState{c: c}},
		}
	}
	// +: the new state; .: ignored, as what comes after the end of a container;
	// x: refused and logged.
	for from, outcomes := range map[string]string{
		"creating":      "++xxx+x+x", // an exit is kept until Create has ended
		"created":       "xx+xx++++",
		"running":       "xxx++xx+x",
		"paused":        "xx+++xx+x", // it is frozen later
		"checkpointing": "xx+++xx+x",
		"unmanaged":     "xxxxxxx+x",
		"ending":        "xxxxxxx++",
		"stopped":       "........+",
		"abandoned":     ".........",
	} {
		for i, to := range names {
			t.Run(from+"-"+to, func(t *testing.T) {
				logged := captureLog(t)
				c := &container{id: "c1", lifecycle: newLifecycle()}
				c.state = states(c)[from]
				if err := c.execGate.close(t.Context(), time.Second); err != nil {
					t.Fatal(err)
				}
				outcome := outcomes[i]
				if got := c.transition(states(c)[to]); got != (outcome == '+') {
					t.Errorf("transition: %t", got)
				}
				want := from
				if outcome == '+' && (from != "creating" || to != "stopped") {
					want = to
				}
				if got := c.current().name(); got != want {
					t.Errorf("the state is %s, want %s", got, want)
				}
				if refused := strings.Contains(logged.String(), "illegal state transition"); refused != (outcome == 'x') {
					t.Errorf("logged as illegal: %t", refused)
				}
				if open := c.execGate.opened == nil; open != (want != "paused" && want != "checkpointing") {
					t.Errorf("the exec gate is open: %t", open)
				}
				select {
				case <-c.abandoned:
					if want != "abandoned" || from == "abandoned" {
						t.Error("reported as abandoned")
					}
				default:
					if to == "abandoned" && outcome == '+' {
						t.Error("not reported as abandoned")
					}
				}
			})
		}
	}
}

// captureLog keeps what is logged until the test ends.
func captureLog(t *testing.T) *logBuffer {
	t.Helper()
	logged, old := &logBuffer{}, log.L.Logger.Out
	log.L.Logger.SetOutput(logged)
	t.Cleanup(func() { log.L.Logger.SetOutput(old) })
	return logged
}

// bringInto brings the container c1 into a state by the calls that lead there.
func (h *harness) bringInto(state string) {
	h.t.Helper()
	ctx := h.t.Context()
	sandbox := func(s *specs.Spec) { s.Annotations["io.kubernetes.cri.container-type"] = "sandbox" }
	switch state {
	case "creating":
		dir := h.bundle(nil)
		<-h.inProgress(h.kata, "Create", func() error {
			_, err := h.task.Create(ctx, &task.CreateTaskRequest{ID: "c1", Bundle: dir})
			return err
		})
	case "created":
		h.create(nil)
	case "running":
		h.run(nil)
	case "paused":
		h.run(nil)
		h.pause()
	case "checkpointing":
		h.run(leaveRunning)
		path := h.t.TempDir()
		<-h.inProgress(h.guest, "Checkpoint", func() error { return h.checkpoint(path, nil) })
	case "unmanaged":
		h.run(sandbox)
	case "ending":
		h.create(nil)
		<-h.inProgress(h.kata, "Start", func() error {
			_, err := h.task.Start(ctx, &task.StartRequest{ID: "c1"})
			return err
		})
		c := h.service.container("c1")
		c.interruptStart()
		eventually(h.t, "the Start was given up", func() bool { return c.current().name() == "ending" })
	case "stopped":
		h.run(nil)
		h.kata.SetStatus("c1", statusStopped)
		h.events.onExit("c1", "")
	case "abandoned":
		h.create(nil)
		if _, err := h.task.Kill(ctx, &task.KillRequest{ID: "c1", Signal: 9}); err != nil {
			h.t.Fatal(err)
		}
	default:
		h.t.Fatal(state)
	}
	if got := h.service.container("c1").current().name(); got != state {
		h.t.Fatalf("the container is %s, want %s", got, state)
	}
}

// inProgress makes a call that stays in method, of Kata or the agent, until the
// test ends. The channel is closed once it is there.
func (h *harness) inProgress(fake interface {
	Before(method string, f func(context.Context) error)
}, method string, call func() error) <-chan struct{} {
	in, release, ended := make(chan struct{}), make(chan struct{}), make(chan struct{})
	reach := sync.OnceFunc(func() { close(in) })
	fake.Before(method, func(context.Context) error {
		reach()
		<-release
		return errors.New("the test has ended")
	})
	go func() {
		defer close(ended)
		_ = call() // which fails, as the method does
	}()
	h.t.Cleanup(func() {
		close(release)
		<-ended
	})
	return in
}

// Every call in every state.
func TestCallsInEveryState(t *testing.T) {
	const waits = codes.DeadlineExceeded // for the end of an operation, or of the container
	const ok, refused, notFound = codes.OK, codes.FailedPrecondition, codes.NotFound
	states := []string{"creating", "created", "running", "paused", "checkpointing", "unmanaged", "ending", "stopped", "abandoned"}
	statuses := []string{"CREATED", "CREATED", "RUNNING", "PAUSED", "PAUSED", "RUNNING", "CREATED", "STOPPED", "STOPPED"}
	path := t.TempDir()
	for name, tc := range map[string]struct {
		call func(context.Context, *harness) error
		want []codes.Code
	}{
		"State": {func(ctx context.Context, h *harness) error {
			_, err := h.task.State(ctx, &task.StateRequest{ID: "c1"})
			return err
		}, []codes.Code{ok, ok, ok, ok, ok, ok, ok, ok, ok}},
		"Start": {func(ctx context.Context, h *harness) error {
			_, err := h.task.Start(ctx, &task.StartRequest{ID: "c1"})
			return err
		}, []codes.Code{waits, ok, refused, refused, waits, ok, refused, refused, refused}},
		// Kata, which is asked where nothing is in the way, has no container before
		// its Create has ended, nor once it was abandoned.
		"Start of an exec": {func(ctx context.Context, h *harness) error {
			_, err := h.task.Start(ctx, &task.StartRequest{ID: "c1", ExecID: "e"})
			return err
		}, []codes.Code{notFound, ok, ok, waits, waits, ok, waits, ok, notFound}},
		"Delete": {func(ctx context.Context, h *harness) error {
			_, err := h.task.Delete(ctx, &task.DeleteRequest{ID: "c1"})
			return err
		}, []codes.Code{notFound, ok, ok, ok, ok, ok, ok, ok, ok}},
		"Pids": {func(ctx context.Context, h *harness) error {
			_, err := h.task.Pids(ctx, &task.PidsRequest{ID: "c1"})
			return err
		}, []codes.Code{ok, ok, ok, ok, ok, ok, ok, ok, ok}},
		"Pause": {func(ctx context.Context, h *harness) error {
			_, err := h.task.Pause(ctx, &task.PauseRequest{ID: "c1"})
			return err
		}, []codes.Code{waits, refused, ok, refused, waits, ok, refused, refused, refused}},
		"Resume": {func(ctx context.Context, h *harness) error {
			_, err := h.task.Resume(ctx, &task.ResumeRequest{ID: "c1"})
			return err
		}, []codes.Code{waits, refused, ok, ok, waits, ok, refused, ok, ok}},
		"Checkpoint": {func(ctx context.Context, h *harness) error {
			_, err := h.task.Checkpoint(ctx, &task.CheckpointTaskRequest{ID: "c1", Path: h.t.TempDir()})
			return err
		}, []codes.Code{waits, refused, ok, ok, refused, refused, refused, refused, refused}},
		"Kill by SIGKILL": {func(ctx context.Context, h *harness) error {
			_, err := h.task.Kill(ctx, &task.KillRequest{ID: "c1", Signal: 9})
			return err
		}, []codes.Code{waits, ok, ok, ok, ok, ok, waits, ok, notFound}},
		"Kill by SIGTERM": {func(ctx context.Context, h *harness) error {
			_, err := h.task.Kill(ctx, &task.KillRequest{ID: "c1", Signal: 15})
			return err
		}, []codes.Code{notFound, ok, ok, ok, ok, ok, ok, ok, notFound}},
		"Exec": {func(ctx context.Context, h *harness) error {
			_, err := h.task.Exec(ctx, &task.ExecProcessRequest{ID: "c1", ExecID: "e"})
			return err
		}, []codes.Code{ok, ok, ok, ok, ok, ok, ok, ok, ok}},
		"CloseIO": {func(ctx context.Context, h *harness) error {
			_, err := h.task.CloseIO(ctx, &task.CloseIORequest{ID: "c1", Stdin: true})
			return err
		}, []codes.Code{waits, waits, ok, ok, ok, ok, ok, ok, waits}},
		"Wait": {func(ctx context.Context, h *harness) error {
			_, err := h.task.Wait(ctx, &task.WaitRequest{ID: "c1"})
			return err
		}, []codes.Code{waits, waits, waits, waits, waits, waits, waits, waits, ok}},
		"Stats": {func(ctx context.Context, h *harness) error {
			_, err := h.task.Stats(ctx, &task.StatsRequest{ID: "c1"})
			return err
		}, []codes.Code{ok, ok, ok, ok, ok, ok, ok, ok, ok}},
		"Connect": {func(ctx context.Context, h *harness) error {
			_, err := h.task.Connect(ctx, &task.ConnectRequest{ID: "c1"})
			return err
		}, []codes.Code{ok, ok, ok, ok, ok, ok, ok, ok, ok}},
		"Checkpoint of a relative path": {func(ctx context.Context, h *harness) error {
			_, err := h.task.Checkpoint(ctx, &task.CheckpointTaskRequest{ID: "c1", Path: "relative"})
			return err
		}, slices.Repeat([]codes.Code{codes.InvalidArgument}, len(states))},
		"Checkpoint of another container": {func(ctx context.Context, h *harness) error {
			_, err := h.task.Checkpoint(ctx, &task.CheckpointTaskRequest{ID: "c2", Path: path})
			return err
		}, slices.Repeat([]codes.Code{notFound}, len(states))},
	} {
		for i, state := range states {
			t.Run(name+"/"+state, func(t *testing.T) {
				h := newHarness(t)
				h.bringInto(state)
				if got := h.status(); got != statuses[i] {
					t.Errorf("State reports %s, want %s", got, statuses[i])
				}
				limit := waitLimit
				if tc.want[i] == waits {
					limit = 30 * time.Millisecond
				}
				ctx, cancel := context.WithTimeout(t.Context(), limit)
				defer cancel()
				err := tc.call(ctx, h)
				code := status.Code(err)
				if errors.Is(err, context.DeadlineExceeded) {
					code = codes.DeadlineExceeded
				}
				if code != tc.want[i] {
					t.Errorf("%s: %v, want %s", code, err, tc.want[i])
				}
			})
		}
	}
}

// A VM may crash before Kata has answered Create. Until it has, State is
// answered here.
func TestExitDuringCreate(t *testing.T) {
	h := newHarness(t)
	dir := h.bundle(nil)
	reached, release := make(chan struct{}), make(chan struct{})
	h.kata.Before("Create", func(context.Context) error {
		close(reached)
		<-release
		return nil
	})
	h.kata.Before("State", func(context.Context) error {
		t.Error("Kata is asked for the state")
		return nil
	})
	created := make(chan error, 1)
	go func() {
		_, err := h.task.Create(t.Context(), &task.CreateTaskRequest{ID: "c1", Bundle: dir})
		created <- err
	}()
	<-reached
	h.events.onExit("c1", "")
	h.wantStatus("CREATED")
	close(release)
	if err := <-created; err != nil {
		t.Fatal(err)
	}
	if got := h.service.container("c1").current().name(); got != "stopped" {
		t.Errorf("after Create it is %s", got)
	}
	_, err := h.task.Start(t.Context(), &task.StartRequest{ID: "c1"})
	wantError(t, err, "has stopped")
}

// Whoever waited for a Create that failed is told so.
func TestCallsThatWaitedForACreateThatFailed(t *testing.T) {
	h := newHarness(t)
	dir := h.bundle(nil)
	reached, release := make(chan struct{}), make(chan struct{})
	h.kata.Before("Create", func(context.Context) error {
		close(reached)
		<-release
		return errors.New("no VM")
	})
	created := make(chan error, 1)
	go func() {
		_, err := h.task.Create(t.Context(), &task.CreateTaskRequest{ID: "c1", Bundle: dir})
		created <- err
	}()
	<-reached
	c := h.service.container("c1")
	started := make(chan error, 1)
	go func() {
		_, err := c.start(t.Context(), &task.StartRequest{ID: "c1"})
		started <- err
	}()
	close(release)
	wantError(t, <-created, "no VM")
	wantError(t, <-started, "could not be created")
	if got := c.current().name(); got != "creating" || c.kind != annotations.Single {
		t.Errorf("it is %s", got)
	}
	h.wantCalls("the agent", h.guest.Calls())
}
