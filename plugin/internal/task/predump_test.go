// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/api/runtime/task/v2"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/config"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
	"github.com/kata-checkpoint/kata-checkpoint/internal/metrics"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/fake"
)

func preDumped(rounds string) func(*specs.Spec) {
	return func(s *specs.Spec) { leaveRunning(s); s.Annotations[annotations.PreDumpKey] = rounds }
}

// frozenLater waits until a deferred Pause has frozen the container.
func (h *harness) frozenLater() {
	h.t.Helper()
	eventually(h.t, "the container is frozen", func() bool { return slices.Contains(h.guest.Calls(), "Freeze c1") })
}

// The memory of a container is copied while it runs, after its Pause and before
// its freeze. The image set is put together, and has no parents.
func TestPreDump(t *testing.T) {
	h := newHarness(t)
	h.run(preDumped("2"))
	h.pause()
	h.wantStatus("PAUSED")
	h.wantCalls("the agent", h.guest.Calls(), "Adopt c1")
	h.guest.Before("PreDump", func(context.Context) error {
		h.wantStatus("PAUSED")
		if h.service.container("c1").execGate.opened != nil {
			t.Error("no exec can start while memory is copied")
		}
		return nil
	})
	path := t.TempDir()
	if err := h.checkpoint(path, nil); err != nil {
		t.Fatal(err)
	}
	h.wantStatus("PAUSED")
	h.wantCalls("the agent", h.guest.Calls(), "Adopt c1", "CheckCheckpoint c1", "PreDump c1", "PreDump c1", "Freeze c1", "Checkpoint c1")
	r := h.guest.Request("Checkpoint").(*api.CheckpointRequest)
	rounds := []string{r.GetDirectory() + "-1", r.GetDirectory() + "-2"}
	if !slices.Equal(r.GetParents(), rounds) || h.guest.Request("PreDump").(*api.PreDumpRequest).GetParent() != rounds[0] {
		t.Errorf("parents %q", r.GetParents())
	}
	set, err := imageset.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer set.Close()
	if data, err := os.ReadFile(filepath.Join(path, "pages-1.img")); err != nil || string(data) != fake.Folded {
		t.Errorf("pages-1.img has %d bytes, %v", len(data), err)
	}
	if len(set.Manifest.Files) != 2 {
		t.Errorf("files %+v", set.Manifest.Files)
	}
	h.resume()
	h.wantStatus("RUNNING")
	h.eventuallyNoImages()
	if d := h.guest.Discarded(); !slices.Equal(d, append(rounds, r.GetDirectory())) {
		t.Errorf("the guest has discarded %q", d)
	}
	if want := []string{"/tasks/paused", "/tasks/checkpointed", "/tasks/resumed"}; !slices.Equal(h.events.published(), want) {
		t.Errorf("events %q", h.events.published())
	}
}

// A user's pause freezes: a moment later, or at once where that is not possible.
func TestPauseOfAContainerWithPreDumps(t *testing.T) {
	byDefault := func(c *config.Config) { c.PreDumps = 3 }
	for name, tc := range map[string]struct {
		spec   func(*specs.Spec)
		config func(*config.Config)
		before func(*harness)
		defers bool
	}{
		"by the annotation":         {spec: preDumped("auto"), defers: true},
		"by the configuration":      {config: byDefault, defers: true},
		"against the configuration": {spec: preDumped("off"), config: byDefault},
		"a kernel without it":       {spec: preDumped("auto"), before: func(h *harness) { h.guest.LosePreDump() }},
		"with another one paused":   {spec: preDumped("auto"), before: (*harness).holdAnother},
	} {
		t.Run(name, func(t *testing.T) {
			change := tc.config
			if change == nil {
				change = func(*config.Config) {}
			}
			h := newHarness(t, withConfig(change))
			h.run(tc.spec)
			if tc.before != nil {
				tc.before(h)
			}
			h.pause()
			h.wantStatus("PAUSED")
			if slices.Contains(h.guest.Calls(), "Freeze c1") == tc.defers {
				t.Errorf("calls to the agent: %q", h.guest.Calls())
			}
			h.frozenLater()
			h.wantStatus("PAUSED")
			if err := h.checkpoint(t.TempDir(), pack(t, &runcoptions.CheckpointOptions{})); err != nil {
				t.Fatal(err)
			}
			if slices.Contains(h.guest.Calls(), "PreDump c1") {
				t.Error("the memory of a frozen container is copied first")
			}
			h.wantStatus("PAUSED")
			h.resume()
			h.wantStatus("RUNNING")
		})
	}
}

// A Resume ends a deferred Pause.
func TestResumeOfADeferredPause(t *testing.T) {
	h := newHarness(t)
	h.run(preDumped("auto"))
	h.pause()
	by := h.service.container("c1").current().(pausedState).by
	h.resume()
	h.wantStatus("RUNNING")
	if err := h.service.container("c1").freezeIfDeferred(t.Context(), by); err != nil {
		t.Fatal(err)
	}
	h.wantStatus("RUNNING")
	h.wantCalls("the agent", h.guest.Calls(), "Adopt c1", "Thaw c1")
}

// A freeze that fails is repeated: State reports the container as paused.
func TestDeferredFreezeThatFails(t *testing.T) {
	h := newHarness(t)
	h.run(preDumped("auto"))
	h.pause()
	h.guest.Before("Freeze", func(context.Context) error { return errors.New("not now") })
	c := h.service.container("c1")
	wantError(t, c.freezeIfDeferred(t.Context(), nil), "not now")
	h.guest.Before("Freeze", func(context.Context) error { return nil })
	if c.current().frozen() || c.execGate.opened != nil {
		t.Error("taken for frozen")
	}
	h.wantStatus("PAUSED")
	if err := c.freezeIfDeferred(t.Context(), nil); err != nil || !c.current().frozen() {
		t.Errorf("not frozen: %v", err)
	}
}

// Whoever pauses a second container of a pod wants both frozen.
func TestPauseFreezesOthersThatAreDeferred(t *testing.T) {
	h := newHarness(t)
	h.run(preDumped("auto"))
	h.pause()
	c := h.service.container("c1")
	c.s.freezeDeferred(t.Context(), &container{})
	h.wantCalls("the agent", h.guest.Calls(), "Adopt c1", "Freeze c1")
	if !c.current().frozen() {
		t.Error("not taken for frozen")
	}
}

// What fails before the freeze leaves the container running, and paused for who
// asks, until its engine resumes it, or freezes it.
func TestCheckpointOfADeferredPauseThatIsRefused(t *testing.T) {
	h := newHarness(t)
	h.run(preDumped("auto"))
	h.pause()
	wantError(t, h.checkpoint(t.TempDir(), pack(t, &runcoptions.CheckpointOptions{})), "ctr task checkpoint --image-path", annotations.PreDumpKey)
	h.wantStatus("PAUSED")
	if slices.Contains(h.guest.Calls(), "Freeze c1") {
		t.Error("frozen for a refusal")
	}
	h.frozenLater()
}

// A round that fails costs no checkpoint, and nothing is based on the ones before.
func TestPreDumpThatFails(t *testing.T) {
	h := newHarness(t)
	h.run(preDumped("auto"))
	n := 0
	h.guest.Before("PreDump", func(context.Context) error {
		if n++; n == 2 {
			return errors.New("CRIU has died")
		}
		return nil
	})
	h.pause()
	path := t.TempDir()
	if err := h.checkpoint(path, nil); err != nil {
		t.Fatal(err)
	}
	if p := h.guest.Request("Checkpoint").(*api.CheckpointRequest).GetParents(); len(p) != 0 || n != 2 {
		t.Errorf("%d rounds, parents %q", n, p)
	}
	h.resume()
	h.eventuallyNoImages()
}

// The rounds end on their own.
func TestPreDumpRounds(t *testing.T) {
	const mib = 1 << 20
	for name, tc := range map[string]struct {
		sizes []uint64
		want  bool
	}{
		"the first one":           {nil, true},
		"the second one":          {[]uint64{100 * mib}, true},
		"little memory":           {[]uint64{mib}, false},
		"it shrinks":              {[]uint64{100 * mib, 20 * mib, 10 * mib}, true},
		"it no longer shrinks":    {[]uint64{100 * mib, 20 * mib, 15 * mib}, false},
		"little is left":          {[]uint64{1024 * mib, 100 * mib, 16 * mib}, false},
		"almost nothing is left":  {[]uint64{100 * mib, mib / 2}, false},
		"it is written too often": {[]uint64{100 * mib, 100 * mib}, false},
	} {
		if got := goesOn(tc.sizes); got != tc.want {
			t.Errorf("%s: %t", name, got)
		}
	}
	h := newHarness(t)
	h.guest.Rounds = []uint64{100 * mib, 10 * mib, 9 * mib, 0}
	h.run(preDumped("auto"))
	h.pause()
	if err := h.checkpoint(t.TempDir(), nil); err != nil {
		t.Fatal(err)
	}
	if p := h.guest.Request("Checkpoint").(*api.CheckpointRequest).GetParents(); len(p) != 3 {
		t.Errorf("rounds %q", p)
	}
}

// The host believes nothing that a guest says of where memory is.
func TestFoldedFilesAreChecked(t *testing.T) {
	for name, lie := range map[string]func(*api.FoldedFile){
		"another directory":   func(f *api.FoldedFile) { f.SourceDirectories[0] = 7 },
		"another name":        func(f *api.FoldedFile) { f.SourceNames[0] = "../../etc/passwd" },
		"no image":            func(f *api.FoldedFile) { f.Name = "x" },
		"the manifest":        func(f *api.FoldedFile) { f.Name = imageset.ManifestName },
		"too few offsets":     func(f *api.FoldedFile) { f.PartOffsets = nil },
		"too many sizes":      func(f *api.FoldedFile) { f.PartSizes = append(f.PartSizes, 1) },
		"an offset too large": func(f *api.FoldedFile) { f.PartOffsets[0] = 1 << 63 },
		"a size too large":    func(f *api.FoldedFile) { f.PartSizes[0] = 1 << 63 },
		"no such source":      func(f *api.FoldedFile) { f.PartSources[0] = 1 << 31 },
		"behind the end":      func(f *api.FoldedFile) { f.PartOffsets[0] = 8192 },
	} {
		t.Run(name, func(t *testing.T) {
			h := newHarness(t)
			h.guest.Fold = func(f *api.FoldedFiles) { lie(f.GetFiles()[0]) }
			h.run(preDumped("1"))
			h.pause()
			path := t.TempDir()
			if err := h.checkpoint(path, nil); err == nil || strings.Contains(err.Error(), "panic") {
				t.Errorf("error %v", err)
			}
			h.resume()
			h.wantStatus("RUNNING")
			h.wantNothingLeft(path)
		})
	}
}

// A checkpoint after a deferred Pause thaws early where that is allowed.
func TestPreDumpAndEarlyThaw(t *testing.T) {
	h := newHarness(t)
	h.run(func(s *specs.Spec) { preDumped("1")(s); s.Annotations[annotations.ThawKey] = annotations.AfterDump })
	h.pause()
	if _, err := h.task.Checkpoint(t.Context(), &task.CheckpointTaskRequest{ID: "c1", Path: t.TempDir()}); err != nil {
		t.Fatal(err)
	}
	h.wantStatus("PAUSED")
	h.wantCalls("the agent", h.guest.Calls(), "Adopt c1", "CheckCheckpoint c1", "PreDump c1", "Freeze c1", "Checkpoint c1", "Thaw c1")
	h.resume()
	h.wantStatus("RUNNING")
}

// A deferred Pause that a checkpoint cannot freeze is as it was before, and the
// container is frozen later. Only that begins its figure.
func TestFreezeOfADeferredPauseThatFails(t *testing.T) {
	spool, option := withSpool(t)
	h := newHarness(t, option)
	h.run(preDumped("1"))
	h.pause()
	h.guest.Before("Freeze", func(context.Context) error { return errors.New("not now") })
	path := t.TempDir()
	wantError(t, h.checkpoint(path, nil), "not now")
	h.guest.Before("Freeze", func(context.Context) error { return nil })
	h.wantStatus("PAUSED")
	st, ok := h.service.container("c1").current().(pausedState)
	if !ok || !st.deferred || st.frozen() {
		t.Errorf("state %+v", st)
	}
	if err := h.checkpoint(path, nil); err != nil {
		t.Fatal(err)
	}
	if done := ofOperation(reports(t, spool), metrics.Frozen); len(done) != 0 {
		t.Errorf("frozen before the freeze: %v", done)
	}
	h.resume()
	if done := ofOperation(reports(t, spool), metrics.Frozen); len(done) != 1 {
		t.Errorf("frozen: %v", done)
	}
	h.wantStatus("RUNNING")
	h.eventuallyNoImages()
}
