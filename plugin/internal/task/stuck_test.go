// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/containerd/v2/core/runtime"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/kata-checkpoint/kata-checkpoint/internal/config"
)

// restoring is a container that the agent is restoring, which ends with its
// context. Started has the answer of Start.
func restoring(t *testing.T) (h *harness, started <-chan error) {
	t.Helper()
	path := imageSet(t)
	h = newHarness(t)
	h.create(nil, func(r *task.CreateTaskRequest) { r.Checkpoint = path })
	in := make(chan struct{})
	h.guest.Before("Restore", func(ctx context.Context) error {
		close(in)
		<-ctx.Done()
		return ctx.Err()
	})
	done := make(chan error, 1)
	go func() {
		_, err := h.task.Start(context.Background(), &task.StartRequest{ID: "c1"})
		done <- err
	}()
	<-in
	return h, done
}

// A pod can be deleted while a restore in it takes its time.
func TestKillEndsARestore(t *testing.T) {
	h, started := restoring(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if _, err := h.task.Kill(ctx, &task.KillRequest{ID: "c1", Signal: uint32(syscall.SIGKILL), All: true}); err != nil {
		t.Fatal(err)
	}
	h.wantStatus("STOPPED")
	wantError(t, <-started, "restore container c1", "the container was killed")
	if !h.kata.Called("Kill c1") {
		t.Error("the placeholder is left")
	}
	if _, err := h.task.Delete(t.Context(), &task.DeleteRequest{ID: "c1"}); err != nil {
		t.Fatal(err)
	}
	if exists(h.exchange()) {
		t.Error("the exchange directory is left")
	}
}

// An agent that answers nothing, not even once its time is up, keeps no restore from
// ending, and nothing of it is left.
func TestARestoreEndsThoughTheAgentHangs(t *testing.T) {
	for _, method := range []string{"Adopt", "CheckRestore", "Restore"} {
		t.Run(method, func(t *testing.T) {
			path := imageSet(t)
			h := newHarness(t, withConfig(func(c *config.Config) { c.CheckpointTimeout = time.Second }))
			h.create(nil, func(r *task.CreateTaskRequest) { r.Checkpoint = path })
			hung := make(chan struct{})
			t.Cleanup(func() { close(hung) })
			h.guest.Before(method, func(context.Context) error {
				<-hung
				return nil
			})
			begin := time.Now()
			_, err := h.task.Start(t.Context(), &task.StartRequest{ID: "c1"})
			wantError(t, err, "c1", "checkpoint_timeout of 1s has expired")
			if took := time.Since(begin); took > cleanupTimeout {
				t.Errorf("the restore ended after %s", took)
			}
			h.wantStatus("STOPPED")
			if _, err := h.task.Delete(t.Context(), &task.DeleteRequest{ID: "c1"}); err != nil {
				t.Fatal(err)
			}
			if exists(h.exchange()) {
				t.Error("the exchange directory is left")
			}
		})
	}
}

// Kata may not end at once what a restore has left that failed or was refused, and
// nobody else may ask for it. Until then it counts neither as stopped nor as
// deleted.
func TestAnEndThatIsOwedIsPaid(t *testing.T) {
	for _, method := range []string{"CheckRestore", "Restore"} {
		t.Run(method, func(t *testing.T) {
			path := imageSet(t)
			h := newHarness(t)
			h.create(nil, func(r *task.CreateTaskRequest) { r.Checkpoint = path })
			h.guest.Before(method, func(context.Context) error { return errors.New("no") })
			var answers atomic.Bool
			h.kata.Before("Kill", func(context.Context) error {
				if answers.Load() {
					return nil
				}
				return errors.New("the VM does not answer")
			})
			_, err := h.task.Start(t.Context(), &task.StartRequest{ID: "c1"})
			wantError(t, err, "restore container c1")
			h.wantStatus("CREATED")
			_, err = h.task.Kill(t.Context(), &task.KillRequest{ID: "c1", Signal: uint32(syscall.SIGKILL), All: true})
			wantError(t, err, "kill container c1: the VM does not answer")
			h.wantStatus("CREATED")
			answers.Store(true)
			eventually(t, "the container has stopped", func() bool { return h.status() == "STOPPED" })
			if h.kata.Called("Delete c1") {
				t.Error("Kata was to delete it before anybody has asked for it")
			}
			if _, err := h.task.Delete(t.Context(), &task.DeleteRequest{ID: "c1"}); err != nil {
				t.Error(err)
			}
		})
	}
}

// lateStarts are what may become of a Start in Kata; those by whose name there is
// true publish the exit themselves.
var lateStarts = map[string]struct {
	starts bool
	become func(*harness) error
}{
	"started": {true, func(*harness) error { return nil }},
	"refused": {false, func(*harness) error { return errors.New("the agent is dead") }},
	"started without its streams": {false, func(h *harness) error {
		h.kata.LoseStreams("c1")
		return nil
	}},
	// The Rust shim ends what it could not follow, and reports no exit.
	"stopped without an exit": {false, func(h *harness) error {
		h.kata.SetStatus("c1", statusStopped)
		return errors.New("open stdout")
	}},
}

// checkEnded checks that a container whose Start has failed has stopped, that its
// exit was published once by whom Kata's Start has left it to, and that an engine
// can delete it.
func (h *harness) checkEnded(waited <-chan error, byKata bool) {
	h.t.Helper()
	eventually(h.t, "the container has stopped", func() bool { return h.status() == "STOPPED" })
	exits := 0
	eventually(h.t, "its exit was published", func() bool {
		exits = 0
		for _, topic := range h.events.published() {
			if topic == runtime.TaskExitEventTopic {
				exits++
			}
		}
		return exits > 0 || byKata
	})
	if exits > 1 || exits == 1 && byKata {
		h.t.Errorf("%d exits were published", exits)
	}
	if byKata {
		if !h.kata.Called("Kill c1") || h.kata.Called("Delete c1") {
			h.t.Errorf("Kata has had %q", h.kata.Calls())
		}
	} else {
		select {
		case err := <-waited:
			if err != nil {
				h.t.Errorf("Wait: %v", err)
			}
		case <-time.After(waitLimit):
			h.t.Error("Wait is not answered")
		}
	}
	ctx, cancel := context.WithTimeout(h.t.Context(), 2*time.Second)
	defer cancel()
	if _, err := h.task.Kill(ctx, &task.KillRequest{ID: "c1", Signal: uint32(syscall.SIGKILL), All: true}); err != nil && !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		h.t.Errorf("Kill: %v", err)
	}
	h.wantStatus("STOPPED")
	if _, err := h.task.Delete(ctx, &task.DeleteRequest{ID: "c1"}); err != nil {
		h.t.Errorf("Delete: %v", err)
	}
	if exists(h.exchange()) {
		h.t.Error("the exchange directory is left")
	}
	if _, err := h.service.down.state(ctx, "c1"); !errdefs.IsNotFound(err) {
		h.t.Errorf("Kata has kept it: %v", err)
	}
}

// wait is the engine's, which it sends before the Start.
func (h *harness) wait() <-chan error {
	waited := make(chan error, 1)
	go func() {
		_, err := h.task.Wait(h.t.Context(), &task.WaitRequest{ID: "c1"})
		waited <- err
	}()
	return waited
}

// A container whose Start was given up ends, whatever Kata makes of the Start once
// it continues: nobody else would end it, and engines delete no task that has not
// stopped.
func TestAStartThatWasGivenUpEnds(t *testing.T) {
	for _, restore := range []bool{true, false} {
		for _, method := range []string{"deadline", "SIGKILL", "refused restore"} {
			if method == "refused restore" && !restore {
				continue
			}
			for name, late := range lateStarts {
				t.Run(fmt.Sprintf("restore %t/%s/%s", restore, method, name), func(t *testing.T) {
					t.Parallel()
					path := imageSet(t)
					h := newHarness(t, withConfig(func(c *config.Config) {
						if method == "deadline" {
							c.CheckpointTimeout = 3 * time.Second
						}
					}))
					h.create(nil, func(r *task.CreateTaskRequest) {
						if restore {
							r.Checkpoint = path
						}
					})
					waited := h.wait()
					in, continues := make(chan struct{}), make(chan struct{})
					reached := sync.OnceFunc(func() { close(in) })
					h.kata.Before("Start", func(context.Context) error {
						reached()
						<-continues
						return late.become(h)
					})
					for _, method := range []string{"State", "Kill", "Delete"} {
						h.kata.Before(method, func(context.Context) error {
							<-continues
							return nil
						})
					}
					want := "checkpoint_timeout of 3s has expired"
					switch method {
					case "SIGKILL":
						want = "was killed"
					case "refused restore":
						h.guest.Before("CheckRestore", func(context.Context) error { return errors.New("no") })
						want = "no"
					}
					started := make(chan error, 1)
					go func() {
						_, err := h.task.Start(t.Context(), &task.StartRequest{ID: "c1"})
						started <- err
					}()
					<-in
					if method == "SIGKILL" {
						// Kata answers nothing.
						ctx, cancel := context.WithTimeout(t.Context(), time.Second)
						defer cancel()
						if _, err := h.task.Kill(ctx, &task.KillRequest{ID: "c1", Signal: uint32(syscall.SIGKILL), All: true}); err == nil {
							t.Error("it was killed in spite of Kata")
						}
					}
					select {
					case err := <-started:
						wantError(t, err, "container c1", want)
					case <-time.After(waitLimit):
						t.Fatal("Start is not answered")
					}
					h.wantStatus("CREATED")
					if h.kata.Called("State c1") {
						t.Error("Kata was asked for the state")
					}
					_, err := h.task.Start(t.Context(), &task.StartRequest{ID: "c1"})
					wantError(t, err, "is being ended")
					close(continues)
					h.checkEnded(waited, late.starts)
				})
			}
		}
	}
}

// A container whose Start has failed has stopped.
func TestAStartThatFailsEnds(t *testing.T) {
	for _, restore := range []bool{true, false} {
		for name, late := range lateStarts {
			if late.starts {
				continue
			}
			t.Run(fmt.Sprintf("restore %t/%s", restore, name), func(t *testing.T) {
				t.Parallel()
				path := imageSet(t)
				h := newHarness(t)
				h.create(nil, func(r *task.CreateTaskRequest) {
					if restore {
						r.Checkpoint = path
					}
				})
				waited := h.wait()
				h.kata.Before("Start", func(context.Context) error { return late.become(h) })
				if _, err := h.task.Start(t.Context(), &task.StartRequest{ID: "c1"}); err == nil {
					t.Fatal("it has started")
				}
				h.checkEnded(waited, false)
			})
		}
	}
}

func execRequest(t *testing.T, id string) *task.ExecProcessRequest {
	t.Helper()
	spec, err := json.Marshal(specs.Process{Args: []string{"id"}, Cwd: "/"})
	if err != nil {
		t.Fatal(err)
	}
	return &task.ExecProcessRequest{ID: "c1", ExecID: id, Spec: &anypb.Any{TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/Process", Value: spec}}
}

// Before a container is restored there is nothing but the placeholder's own
// namespaces to start an exec in, and none may be there.
func TestNoExecBeforeTheRestoreIsDone(t *testing.T) {
	h, started := restoring(t)
	_, err := h.task.Exec(t.Context(), execRequest(t, "e"))
	if !errdefs.IsFailedPrecondition(errgrpc.ToNative(err)) {
		t.Errorf("an exec: %v", err)
	}
	wantError(t, err, "exec e: container c1 is being restored")
	if slices.ContainsFunc(h.kata.Calls(), func(call string) bool { return strings.HasPrefix(call, "Exec") }) {
		t.Errorf("Kata has had %q", h.kata.Calls())
	}
	if _, err := h.task.Kill(t.Context(), &task.KillRequest{ID: "c1", Signal: uint32(syscall.SIGKILL), All: true}); err != nil {
		t.Fatal(err)
	}
	wantError(t, <-started, "restore container c1", "the container was killed")
}

// A dump that outlasts its deadline and the time for the thaw leaves a container
// that is thawed as soon as the agent can, and execs work again.
func TestAThawThatIsOwedIsPaid(t *testing.T) {
	h := newHarness(t, withConfig(func(c *config.Config) {
		c.CheckpointTimeout, c.FreezeTimeout = 3*time.Second, time.Second
	}))
	h.run(nil)
	dumpEnds := make(chan struct{})
	var failed atomic.Int32 // thaws
	h.guest.Before("Checkpoint", func(ctx context.Context) error {
		<-dumpEnds
		return ctx.Err()
	})
	h.guest.Before("Thaw", func(ctx context.Context) error {
		select {
		case <-dumpEnds:
			return nil
		case <-ctx.Done():
			failed.Add(1)
			return ctx.Err()
		}
	})
	wantError(t, h.checkpoint(t.TempDir(), nil), "checkpoint_timeout of 3s has expired")
	h.wantStatus("PAUSED")
	eventually(t, "thaws have failed", func() bool { return failed.Load() >= 2 })
	h.wantStatus("PAUSED")
	close(dumpEnds)
	eventually(t, "the container runs", func() bool { return h.status() == "RUNNING" })
	if _, err := h.task.Exec(t.Context(), execRequest(t, "e")); err != nil {
		t.Fatal(err)
	}
	if _, err := h.task.Start(t.Context(), &task.StartRequest{ID: "c1", ExecID: "e"}); err != nil {
		t.Errorf("an exec afterwards: %v", err)
	}
}

// Nobody counts as running by a clock that was set back.
func TestTheAgeOfAStateIsMonotonic(t *testing.T) {
	h := newHarness(t)
	h.run(nil)
	h.wantStatus("RUNNING")
	if at := h.service.container("c1").runningAt.Load(); at == nil || !strings.Contains(at.String(), " m=") {
		t.Errorf("the state was cached at %v", at)
	}
}

// Nothing begins once the service waits for what is in progress.
func TestNothingBeginsDuringTheStop(t *testing.T) {
	var p inProgress
	if !p.enter() {
		t.Fatal("nothing can begin")
	}
	waited := make(chan struct{})
	go func() {
		defer close(waited)
		p.wait()
	}()
	for p.enter() {
		p.leave()
	}
	select {
	case <-waited:
		t.Fatal("it does not wait for what is in progress")
	default:
	}
	p.leave()
	<-waited
}
