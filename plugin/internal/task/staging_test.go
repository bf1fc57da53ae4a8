// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"

	"github.com/kata-checkpoint/kata-checkpoint/internal/adjust"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
)

// overlapping is a harness in which each image set counts as a large one.
func overlapping(t *testing.T, options ...option) (h *harness, staging string) {
	t.Helper()
	h = newHarness(t, options...)
	h.service.overlapFrom = 1
	return h, adjust.StagingDir(h.cfg.StateDir, "ns", "c1")
}

func names(t *testing.T, dir string) (out []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Error(err)
	}
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

// The guest sees nothing of a large image set before all of it is verified.
func TestALargeSetIsStagedWhileKataCreatesTheContainer(t *testing.T) {
	path := imageSet(t)
	h, staging := overlapping(t)
	h.kata.Before("Create", func(context.Context) error {
		<-h.service.container("c1").exchange.staged().done
		if got := names(t, staging); !slices.Equal(got, []string{"inventory.img", "pages-1.img"}) {
			t.Errorf("staged: %q", got)
		}
		return nil
	})
	h.create(nil, func(r *task.CreateTaskRequest) { r.Checkpoint = path })
	if exists(filepath.Join(h.exchange(), restoreDir)) {
		t.Error("the image set is in the exchange directory before Start")
	}
	h.guest.Before("CheckRestore", func(context.Context) error {
		if got := names(t, filepath.Join(h.exchange(), restoreDir)); !slices.Equal(got, []string{"inventory.img", "pages-1.img"}) {
			t.Errorf("in the exchange directory: %q", got)
		}
		return nil
	})
	if _, err := h.task.Start(t.Context(), &task.StartRequest{ID: "c1"}); err != nil {
		t.Fatal(err)
	}
	h.wantStatus("RUNNING")
	if exists(staging) {
		t.Error("the staging directory is left")
	}
	if !exists(filepath.Join(path, imageset.ManifestName)) {
		t.Error("the checkpoint itself is gone")
	}
}

// The files of a set are its smaller part, and what is wrong with the rest is found
// before Kata is asked for anything.
func TestALargeSetThatDoesNotFitIsRefusedBeforeKatasCreate(t *testing.T) {
	path := imageSet(t)
	if err := os.Truncate(filepath.Join(path, "pages-1.img"), 1); err != nil {
		t.Fatal(err)
	}
	h, staging := overlapping(t)
	_, err := h.task.Create(t.Context(), &task.CreateTaskRequest{ID: "c1", Bundle: h.bundle(nil), Checkpoint: path})
	wantError(t, err, "pages-1.img has 1 bytes")
	h.wantCalls("Kata", h.kata.Calls())
	if exists(h.exchange()) || exists(staging) {
		t.Error("a directory is left")
	}
}

// Damage in a large set is found by Start, and ends the container as any restore
// that is refused.
func TestADamagedLargeSetIsRefusedByStart(t *testing.T) {
	path := imageSet(t)
	if err := os.WriteFile(filepath.Join(path, "pages-1.img"), []byte(strings.Repeat("q", 4096)), 0o600); err != nil {
		t.Fatal(err)
	}
	h, staging := overlapping(t)
	h.create(nil, func(r *task.CreateTaskRequest) { r.Checkpoint = path })
	_, err := h.task.Start(t.Context(), &task.StartRequest{ID: "c1"})
	wantError(t, err, "restore container c1 from "+path, "pages-1.img is damaged", "use another copy")
	if !errdefs.IsFailedPrecondition(errgrpc.ToNative(err)) {
		t.Errorf("the error's class: %v", err)
	}
	h.wantCalls("the agent", h.guest.Calls(), "Adopt c1")
	h.wantStatus("STOPPED")
	if _, err := h.task.Delete(t.Context(), &task.DeleteRequest{ID: "c1"}); err != nil {
		t.Fatal(err)
	}
	if exists(h.exchange()) || exists(staging) {
		t.Error("a directory is left")
	}
}

// Whatever a guest has put into the exchange directory, in the time in which it can
// write there, is not taken for an image set.
func TestAnImageSetReplacesNothingOfTheGuests(t *testing.T) {
	path, elsewhere := imageSet(t), t.TempDir()
	h, _ := overlapping(t)
	h.create(nil, func(r *task.CreateTaskRequest) { r.Checkpoint = path })
	if err := os.Symlink(elsewhere, filepath.Join(h.exchange(), restoreDir)); err != nil {
		t.Fatal(err)
	}
	_, err := h.task.Start(t.Context(), &task.StartRequest{ID: "c1"})
	wantError(t, err, "restore container c1", "file exists")
	if got := names(t, elsewhere); len(got) > 0 {
		t.Errorf("outside of the exchange directory there is %q", got)
	}
}

// A large set is given up with its container: if Kata cannot create it, or it is
// deleted before it starts, containerd's copy included.
func TestAStagedSetIsGivenUpWithItsContainer(t *testing.T) {
	temp := t.TempDir()
	t.Setenv("XDG_RUNTIME_DIR", temp)
	for name, end := range map[string]func(h *harness, r *task.CreateTaskRequest){
		"Kata cannot create it": func(h *harness, r *task.CreateTaskRequest) {
			h.kata.Before("Create", func(context.Context) error { return errors.New("no memory") })
			_, err := h.task.Create(t.Context(), r)
			wantError(t, err, "no memory")
		},
		"deleted": func(h *harness, r *task.CreateTaskRequest) {
			if _, err := h.task.Create(t.Context(), r); err != nil {
				t.Fatal(err)
			}
			if _, err := h.task.Kill(t.Context(), &task.KillRequest{ID: "c1", Signal: uint32(syscall.SIGKILL)}); err != nil {
				t.Fatal(err)
			}
			if _, err := h.task.Delete(t.Context(), &task.DeleteRequest{ID: "c1"}); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(temp, "ctrd-checkpoint123")
			if err := errors.Join(os.Rename(imageSet(t), path), os.Chmod(path, 0o700)); err != nil {
				t.Fatal(err)
			}
			h, staging := overlapping(t)
			end(h, &task.CreateTaskRequest{ID: "c1", Bundle: h.bundle(nil), Checkpoint: path})
			for _, path := range []string{h.exchange(), staging, path} {
				if exists(path) {
					t.Errorf("%s is left", path)
				}
			}
		})
	}
}

// A SIGKILL ends a Start that waits for a large set.
func TestKillEndsAStartThatWaitsForItsImages(t *testing.T) {
	path := imageSet(t)
	h := newHarness(t)
	h.create(nil, func(r *task.CreateTaskRequest) { r.Checkpoint = path })
	done := make(chan struct{})
	canceled := make(chan struct{})
	h.service.container("c1").exchange.setStaging(&staging{
		dir: filepath.Join(t.TempDir(), "none"), done: done,
		cancel: func(error) {
			select {
			case <-canceled:
			default:
				close(canceled)
				close(done)
			}
		},
	})
	started := make(chan error, 1)
	go func() {
		_, err := h.task.Start(context.Background(), &task.StartRequest{ID: "c1"})
		started <- err
	}()
	eventually(t, "the agent adopts the container", func() bool { return slices.Contains(h.guest.Calls(), "Adopt c1") })
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute) // a busy machine may need some
	defer cancel()
	if _, err := h.task.Kill(ctx, &task.KillRequest{ID: "c1", Signal: uint32(syscall.SIGKILL), All: true}); err != nil {
		t.Fatal(err)
	}
	wantError(t, <-started, "restore container c1", "the container was killed")
	select {
	case <-canceled:
	default:
		t.Error("the set is still being copied")
	}
	h.wantStatus("STOPPED")
}
