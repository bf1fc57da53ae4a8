// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v2"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/config"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
	"github.com/kata-checkpoint/kata-checkpoint/internal/metrics"
)

// A container that an engine has paused runs again before its Resume only where
// the engine reads nothing that the container can change.
func TestEarlyThaw(t *testing.T) {
	annotated := func(value string) func(*specs.Spec) {
		return func(s *specs.Spec) { leaveRunning(s); s.Annotations[annotations.ThawKey] = value }
	}
	cri := func(readonly bool, change func(*specs.Spec)) func(*specs.Spec) {
		return func(s *specs.Spec) {
			s.Annotations["io.kubernetes.cri.container-type"], s.Annotations["io.kubernetes.cri.sandbox-id"] = "container", "c0"
			s.Root = &specs.Root{Path: "rootfs", Readonly: readonly}
			if change != nil {
				change(s)
			}
		}
	}
	byDefault := func(c *config.Config) { c.Thaw = annotations.AfterDump }
	for name, tc := range map[string]struct {
		spec    func(*specs.Spec)
		config  func(*config.Config)
		between func(*harness) // Pause and Checkpoint
		options *runcoptions.CheckpointOptions
		want    bool
	}{
		"nobody has asked for it":         {spec: leaveRunning},
		"by the annotation":               {spec: annotated("after-dump"), want: true},
		"by the annotation, with ctr":     {spec: annotated("after-dump"), options: &runcoptions.CheckpointOptions{}, want: true},
		"by the configuration":            {spec: leaveRunning, config: byDefault, want: true},
		"not by the annotation":           {spec: annotated("at-resume"), config: byDefault},
		"paused by the user":              {spec: annotated("after-dump"), between: func(h *harness) { h.wantStatus("PAUSED") }},
		"paused a while ago":              {spec: annotated("after-dump"), between: (*harness).age},
		"with another one that is paused": {spec: annotated("after-dump"), between: (*harness).holdAnother},
		"the CRI, a writable root":        {spec: cri(false, nil), config: byDefault},
		"the CRI, against the annotation": {spec: cri(false, annotated("after-dump"))},
		"the CRI, a read-only root":       {spec: cri(true, nil), want: true},
		"the CRI, not by the annotation":  {spec: cri(true, annotated("at-resume"))},
		"ctr, a container of the CRI":     {spec: cri(true, nil), options: &runcoptions.CheckpointOptions{}},
		"the CRI, a root that can be remounted": {spec: cri(true, func(s *specs.Spec) {
			s.Process.Capabilities.Bounding = []string{"cap_sys_admin"}
		})},
	} {
		t.Run(name, func(t *testing.T) {
			change := tc.config
			if change == nil {
				change = func(*config.Config) {}
			}
			h := newHarness(t, withConfig(change))
			h.run(tc.spec)
			h.wantStatus("RUNNING") // as containerd's client, which asks first
			h.pause()
			if tc.between != nil {
				tc.between(h)
			}
			r := &task.CheckpointTaskRequest{ID: "c1", Path: t.TempDir()}
			if tc.options != nil {
				r.Options = pack(t, tc.options)
			}
			if _, err := h.task.Checkpoint(t.Context(), r); err != nil {
				t.Fatal(err)
			}
			if got := slices.Contains(h.guest.Calls(), "Thaw c1"); got != tc.want {
				t.Errorf("thawed before the Resume: %t", got)
			}
			h.wantStatus("PAUSED")
			if open := h.service.container("c1").execGate.opened == nil; open != tc.want {
				t.Errorf("an exec can start: %t", open)
			}
			h.resume()
			h.wantStatus("RUNNING")
			if want := []string{"/tasks/paused", "/tasks/checkpointed", "/tasks/resumed"}; !slices.Equal(h.events.published(), want) {
				t.Errorf("events %q", h.events.published())
			}
		})
	}
}

// age makes the Pause of c1 an earlier one.
func (h *harness) age() {
	c := h.service.container("c1")
	c.mu.Lock()
	defer c.mu.Unlock()
	st := c.state.(pausedState)
	st.by.at = st.by.at.Add(-bracketTime)
}

// holdAnother adds a paused container to the sandbox.
func (h *harness) holdAnother() {
	other := &container{s: h.service, id: "other", lifecycle: newLifecycle()}
	other.state = pausedState{c: other, by: &pause{at: time.Now()}}
	h.service.add(other)
}

// A checkpoint that stops the container does not thaw it, and one that fails
// after the thaw leaves it running.
func TestEarlyThawIsNoStop(t *testing.T) {
	thawed := func(s *specs.Spec) { s.Annotations[annotations.ThawKey] = annotations.AfterDump }
	h := newHarness(t)
	h.run(thawed)
	h.pause()
	if err := h.checkpoint(t.TempDir(), nil); err != nil {
		t.Fatal(err)
	}
	h.wantStatus("STOPPED")
	if slices.Contains(h.guest.Calls(), "Thaw c1") {
		t.Error("thawed before it was killed")
	}
}

func TestEarlyThawOfACheckpointThatFails(t *testing.T) {
	h := newHarness(t, withConfig(func(c *config.Config) { c.MaxImageBytes = 1 }))
	h.run(func(s *specs.Spec) { leaveRunning(s); s.Annotations[annotations.ThawKey] = annotations.AfterDump })
	h.pause()
	path := t.TempDir()
	wantError(t, h.checkpoint(path, nil), "max_image_bytes")
	if !slices.Contains(h.guest.Calls(), "Thaw c1") {
		t.Error("not thawed")
	}
	h.wantStatus("PAUSED")
	h.resume()
	h.wantStatus("RUNNING")
	h.wantNothingLeft(path)
}

// An agent of an earlier release thaws no container on its own. A Freeze that comes
// too late is before the thaw in any case.
func TestEarlyThawByTheShim(t *testing.T) {
	for name, earlier := range map[string]bool{"this release": false, "an earlier one": true} {
		t.Run(name, func(t *testing.T) {
			h := newHarness(t)
			h.guest.Earlier = earlier
			h.run(leaveRunning)
			path := t.TempDir()
			if err := h.checkpoint(path, nil); err != nil {
				t.Fatal(err)
			}
			h.wantStatus("RUNNING")
			h.wantCalls("the agent", h.guest.Calls(), "Adopt c1", "CheckCheckpoint c1", "Freeze c1", "Checkpoint c1", "Thaw c1")
			freeze, dump := h.guest.Request("Freeze").(*api.ContainerRequest), h.guest.Request("Checkpoint").(*api.CheckpointRequest)
			if !dump.GetThaw() || dump.GetTurn() <= freeze.GetTurn() {
				t.Errorf("the request is %v, after a freeze with turn %d", dump, freeze.GetTurn())
			}
			set, err := imageset.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			defer set.Close()
			var thaws []string
			for _, p := range set.Manifest.Phases {
				if strings.HasSuffix(p.Name, "thaw") {
					thaws = append(thaws, p.Name)
				}
			}
			if want := map[bool]string{false: "guest: thaw", true: "thaw"}[earlier]; strings.Join(thaws, ", ") != want {
				t.Errorf("phases %q, want %s", thaws, want)
			}
		})
	}
}

// The workload's figure ends with the early thaw, and the Resume adds none.
func TestEarlyThawIsReported(t *testing.T) {
	spool, option := withSpool(t)
	h := newHarness(t, option)
	h.run(func(s *specs.Spec) { leaveRunning(s); s.Annotations[annotations.ThawKey] = annotations.AfterDump })
	h.pause()
	if err := h.checkpoint(t.TempDir(), nil); err != nil {
		t.Fatal(err)
	}
	if done := ofOperation(reports(t, spool), metrics.Frozen); len(done) != 1 {
		t.Errorf("frozen before the Resume: %v", done)
	}
	h.resume()
	if done := ofOperation(reports(t, spool), metrics.Frozen); len(done) != 0 {
		t.Errorf("frozen after the thaw: %v", done)
	}
}

// One that runs although it is reported as paused does so after the next
// checkpoint, even if that fails.
func TestEarlyThawOfAnother(t *testing.T) {
	h := newHarness(t)
	h.run(func(s *specs.Spec) { leaveRunning(s); s.Annotations[annotations.ThawKey] = annotations.AfterDump })
	h.pause()
	if err := h.checkpoint(t.TempDir(), nil); err != nil {
		t.Fatal(err)
	}
	h.guest.Before("Checkpoint", func(context.Context) error { return errors.New("CRIU has failed") })
	path := t.TempDir()
	wantError(t, h.checkpoint(path, nil), "CRIU has failed")
	h.wantStatus("PAUSED")
	if c := h.service.container("c1"); c.isFrozen() || c.execGate.opened != nil {
		t.Error("frozen")
	}
	calls := h.guest.Calls()
	if calls[len(calls)-1] != "Thaw c1" {
		t.Errorf("calls to the agent: %q", calls)
	}
	h.resume()
	h.wantStatus("RUNNING")
	h.wantNothingLeft(path)
}
