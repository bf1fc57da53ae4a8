// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
)

func (h *harness) check(id string) (*api.CheckResponse, error) {
	return api.NewShimClient(h.conn).Check(h.t.Context(), &api.CheckRequest{ContainerId: id})
}

func TestCheck(t *testing.T) {
	h := newHarness(t)
	h.run(nil)
	r, err := h.check("c1")
	if err != nil {
		t.Fatal(err)
	}
	if len(r.GetReasons()) != 0 || r.GetUnchecked() || r.GetState() != "running" || !r.GetStops() {
		t.Errorf("a container that can be checkpointed: %v", r)
	}
	h.wantStatus("RUNNING")

	// Everything is said at once.
	h.guest.SetProblems("the guest kernel is too small")
	h.guest.Before("CheckCheckpoint", func(context.Context) error {
		return errgrpc.ToGRPCf(errdefs.ErrFailedPrecondition, "the workload uses io_uring")
	})
	if r, err = h.check("c1"); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(r.GetReasons(), "|"); !strings.Contains(got, "too small|") || !strings.Contains(got, "io_uring") {
		t.Errorf("the reasons are %q", got)
	}

	// The processes of a frozen container are not looked at.
	h.guest.SetProblems()
	h.pause()
	if r, err = h.check("c1"); err != nil {
		t.Fatal(err)
	}
	if !r.GetUnchecked() || r.GetState() != "paused" || len(r.GetReasons()) != 0 {
		t.Errorf("a paused container: %v", r)
	}
	h.wantStatus("PAUSED")
	if _, err := h.check("other"); err == nil {
		t.Error("a container that does not exist can be checkpointed")
	}
}

func TestCheckBeforeStart(t *testing.T) {
	h := newHarness(t)
	h.create(nil)
	r, err := h.check("c1")
	if err != nil {
		t.Fatal(err)
	}
	if len(r.GetReasons()) != 1 || !strings.Contains(r.GetReasons()[0], "created") {
		t.Errorf("a container that was not started: %v", r)
	}
}

func TestCheckWithoutAgent(t *testing.T) {
	h := newHarness(t, withoutAgent, withoutWait, func(h *harness) { h.cfg.AgentOptional = true })
	h.run(nil)
	r, err := h.check("c1")
	if err != nil {
		t.Fatal(err)
	}
	if len(r.GetReasons()) != 1 || !strings.Contains(r.GetReasons()[0], "no agent in this VM") {
		t.Errorf("a container without an agent: %v", r)
	}
}
