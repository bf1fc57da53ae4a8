// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v2"
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

// A container that Kata starts after the deadline of its Start runs. A SIGKILL ends
// it like any other, in Kata.
func TestKillAfterAStartThatTookTooLong(t *testing.T) {
	for name, restore := range map[string]bool{"a restore": true, "another": false} {
		t.Run(name, func(t *testing.T) {
			path := imageSet(t)
			h := newHarness(t, withConfig(func(c *config.Config) { c.CheckpointTimeout = time.Second }))
			h.create(nil, func(r *task.CreateTaskRequest) {
				if restore {
					r.Checkpoint = path
				}
			})
			continues := make(chan struct{})
			h.kata.Before("Start", func(context.Context) error {
				<-continues
				return nil
			})
			_, err := h.task.Start(t.Context(), &task.StartRequest{ID: "c1"})
			wantError(t, err, "checkpoint_timeout of 1s has expired")
			close(continues)
			kata := func() string {
				st, err := h.service.down.state(t.Context(), "c1")
				if err != nil {
					t.Fatal(err)
				}
				return st.GetStatus().String()
			}
			eventually(t, "Kata has started it", func() bool { return kata() == "RUNNING" })
			if _, err := h.task.Kill(t.Context(), &task.KillRequest{ID: "c1", Signal: uint32(syscall.SIGKILL), All: true}); err != nil {
				t.Fatal(err)
			}
			if h.kata.Called("Delete c1") {
				t.Error("Kata was to delete a container that ran")
			}
			h.wantStatus("STOPPED")
			if now := kata(); now != "STOPPED" {
				t.Errorf("in Kata it is %s", now)
			}
		})
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
