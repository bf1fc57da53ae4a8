// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/errdefs/pkg/errgrpc"

	"github.com/kata-checkpoint/kata-checkpoint/internal/config"
)

// Every engine pauses before it checkpoints: an agent that has died is
// restarted by Pause already.
func TestPauseStartsAnAgentThatHasDied(t *testing.T) {
	h := newHarness(t)
	h.run(nil)
	h.guest.SetThere(false)
	h.kata.Before("Create", func(context.Context) error {
		h.guest.SetThere(true)
		return nil
	})
	h.pause()
	if got := h.status(); got != "PAUSED" {
		t.Errorf("State reports %s", got)
	}
}

// An agent has agent_timeout to start, and freeze_timeout only to freeze.
func TestPauseWaitsForAnAgentThatStarts(t *testing.T) {
	const freeze = 300 * time.Millisecond
	h := newHarness(t, withConfig(func(c *config.Config) { c.FreezeTimeout = freeze }))
	h.run(nil)
	h.guest.Before("Freeze", func(context.Context) error {
		h.guest.Before("Freeze", nil)
		h.guest.SetThere(false)
		return errors.New("nobody hears this")
	})
	h.kata.Before("Create", func(ctx context.Context) error {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(2 * freeze):
		}
		h.guest.SetThere(true)
		return nil
	})
	h.pause()
	h.wantStatus("PAUSED")
}

// A container that does not freeze in time is thawed, and the error names the
// setting.
func TestPauseNamesItsTimeout(t *testing.T) {
	h := newHarness(t, withConfig(func(c *config.Config) { c.FreezeTimeout = 300 * time.Millisecond }))
	h.run(nil)
	h.guest.Before("Freeze", func(ctx context.Context) error {
		<-ctx.Done()
		return ctx.Err()
	})
	_, err := h.task.Pause(t.Context(), &task.PauseRequest{ID: "c1"})
	wantError(t, err, "freeze_timeout of 300ms has expired")
	h.wantStatus("RUNNING")
}

// The agent's clock may be ahead: it says first that the time is up.
func TestPauseNamesItsTimeoutWhoeverSaysItFirst(t *testing.T) {
	h := newHarness(t, withConfig(func(c *config.Config) { c.FreezeTimeout = 300 * time.Millisecond }))
	h.run(nil)
	h.guest.Before("Freeze", func(context.Context) error { return errgrpc.ToGRPC(context.DeadlineExceeded) })
	_, err := h.task.Pause(t.Context(), &task.PauseRequest{ID: "c1"})
	wantError(t, err, "freeze_timeout of 300ms has expired")
	h.wantStatus("RUNNING")
}

// An agent that dies during a checkpoint is restarted, to thaw the container,
// and the error says so.
func TestCheckpointWhoseAgentDies(t *testing.T) {
	h := newHarness(t)
	h.run(nil)
	h.guest.Before("Checkpoint", func(context.Context) error {
		h.guest.SetThere(false)
		return errors.New("nobody hears this")
	})
	h.kata.Before("Create", func(context.Context) error {
		h.guest.SetThere(true)
		return nil
	})
	wantError(t, h.checkpoint(t.TempDir(), nil), "the agent in the guest is gone", "has been restarted", "repeat the checkpoint")
	if got := h.status(); got != "RUNNING" {
		t.Errorf("State reports %s", got)
	}
	if calls := h.guest.Calls(); !slices.Contains(calls, "Thaw c1") {
		t.Errorf("calls to the agent: %q", calls)
	}
}

// If it cannot be restarted at once, the container is thawed when an agent is
// there, or by the engine's Resume.
func TestThawThatHasToWaitForTheAgent(t *testing.T) {
	h := newHarness(t)
	h.run(nil)
	h.guest.Before("Checkpoint", func(context.Context) error {
		h.guest.SetThere(false)
		return errors.New("nobody hears this")
	})
	h.kata.Before("Create", func(context.Context) error { return errors.New("no room") })
	wantError(t, h.checkpoint(t.TempDir(), nil), "the agent in the guest is gone", "could not be restarted")
	if got := h.status(); got != "PAUSED" {
		t.Errorf("State reports %s", got)
	}
	h.guest.SetThere(true)
	if _, err := h.task.Resume(t.Context(), &task.ResumeRequest{ID: "c1"}); err != nil {
		t.Fatal(err)
	}
	if got := h.status(); got != "RUNNING" {
		t.Errorf("State reports %s", got)
	}
}

// A checkpoint during which Kata's shim dies waits for nobody in a guest that
// is lost.
func TestCheckpointDuringWhichKataDies(t *testing.T) {
	h := newHarness(t)
	h.run(nil)
	h.guest.Before("Checkpoint", func(ctx context.Context) error {
		h.kata.Die()
		<-ctx.Done()
		return ctx.Err()
	})
	h.guest.Before("Thaw", func(ctx context.Context) error {
		<-ctx.Done()
		return ctx.Err()
	})
	begin := time.Now()
	wantError(t, h.checkpoint(t.TempDir(), nil), "Kata's shim has exited")
	if took := time.Since(begin); took > cleanupTimeout/2 {
		t.Errorf("it took %s", took)
	}
}
