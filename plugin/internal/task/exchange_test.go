// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v2"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/adjust"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/budget"
	"github.com/kata-checkpoint/kata-checkpoint/internal/config"
)

// The guest can write to its exchange directory during a checkpoint or a
// restore, and at no other time.
func TestTheGuestWritesDuringOperationsOnly(t *testing.T) {
	path := imageSet(t)
	h := newHarness(t)
	h.create(nil, func(r *task.CreateTaskRequest) { r.Checkpoint = path })
	want := func(when string, writable bool) {
		t.Helper()
		if got := h.share.isWritable(); got != writable {
			t.Errorf("%s: the guest can write: %v", when, got)
		}
	}
	during := func(when string) func(context.Context) error {
		return func(context.Context) error {
			want(when, true)
			return nil
		}
	}
	want("after Create", false)
	for _, method := range []string{"Restore", "Checkpoint", "Discard"} {
		h.guest.Before(method, during(method))
	}
	h.guest.Before("Adopt", func(context.Context) error {
		want("before the start", false)
		return nil
	})
	if _, err := h.task.Start(t.Context(), &task.StartRequest{ID: "c1"}); err != nil {
		t.Fatal(err)
	}
	want("after the restore", false)
	h.pause()
	want("while it is paused", false)
	if err := h.checkpoint(t.TempDir(), pack(t, &runcoptions.CheckpointOptions{})); err != nil {
		t.Fatal(err)
	}
	want("until the stale images are discarded", true)
	h.resume()
	eventually(t, "the guest cannot write after a checkpoint", func() bool { return !h.share.isWritable() })

	h.guest.Before("Checkpoint", func(context.Context) error { return errors.New("no") })
	wantError(t, h.checkpoint(t.TempDir(), pack(t, &runcoptions.CheckpointOptions{})), "no")
	want("after a checkpoint that failed", false)
	if h.share.changes != 3 {
		t.Errorf("it was let write %d times", h.share.changes)
	}
}

// A guest that writes more than a checkpoint can need loses the checkpoint, and
// its container nothing.
func TestAGuestThatFillsTheDisk(t *testing.T) {
	for name, tc := range map[string]struct {
		fill func(dir string) error
		err  string
	}{
		"many files": {func(dir string) error {
			for i := range 200 {
				if err := os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), nil, 0o600); err != nil {
					return err
				}
			}
			return nil
		}, "max_image_files"},
		"beside the images": {func(dir string) error {
			f, err := os.Create(filepath.Join(filepath.Dir(dir), "more"))
			if err != nil {
				return err
			}
			defer f.Close()
			return unix.Fallocate(int(f.Fd()), 0, 0, 300<<20)
		}, "max_image_bytes"},
		"the marker": {func(dir string) error {
			f, err := os.OpenFile(filepath.Join(filepath.Dir(dir), api.MarkerName), os.O_WRONLY|os.O_TRUNC, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			return unix.Fallocate(int(f.Fd()), 0, 0, 300<<20)
		}, "max_image_bytes"},
		"a tree": {func(dir string) error { return os.MkdirAll(filepath.Join(dir, "a", "b"), 0o700) }, "flat"},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHarness(t)
			h.run(leaveRunning)
			h.pause()
			ended := make(chan struct{})
			h.guest.Before("Checkpoint", func(ctx context.Context) error {
				defer close(ended)
				dir := filepath.Join(h.exchange(), h.guest.Request("Checkpoint").(*api.CheckpointRequest).GetDirectory())
				if err := tc.fill(dir); err != nil && !errors.Is(err, os.ErrNotExist) { // it may have been removed already
					t.Error(err)
				}
				<-ctx.Done() // it would write on
				return ctx.Err()
			})
			path := t.TempDir()
			wantError(t, h.checkpoint(path, nil), "the guest writes more than it may", tc.err)
			select {
			case <-ended:
			case <-time.After(waitLimit):
				t.Error("the agent's call continues")
			}
			h.wantStatus("PAUSED") // its caller will resume it
			if entries, empty := h.noImages(); !empty {
				t.Errorf("left in the exchange directory: %v", entries)
			}
			if marker, err := os.ReadFile(filepath.Join(h.exchange(), api.MarkerName)); err != nil || len(marker) < 10 {
				t.Errorf("the marker is %q, %v", marker, err)
			}
			h.guest.Before("Checkpoint", nil)
			if err := h.checkpoint(t.TempDir(), nil); err != nil {
				t.Errorf("the next one: %v", err)
			}
			h.resume()
			if got, err := os.ReadDir(path); err != nil || len(got) > 0 {
				t.Errorf("left in the image directory: %v, %v", got, err)
			}
		})
	}
}

// The disk that the images pass through keeps its reserve.
func TestAFullStateDirectory(t *testing.T) {
	state := t.TempDir()
	if err := unix.Mount("state", state, "tmpfs", 0, "size=4m"); err != nil {
		t.Skip("needs to mount: ", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(state, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	h := newHarness(t, withConfig(func(c *config.Config) { c.StateDir, c.ReserveBytes = state, 1<<30 }))
	h.run(leaveRunning)
	other := filepath.Join(state, "other")
	fill := func() error { return os.WriteFile(other, make([]byte, 3900<<10), 0o600) }
	h.guest.Before("Checkpoint", func(ctx context.Context) error {
		if err := fill(); err != nil {
			t.Error(err)
		}
		<-ctx.Done()
		return ctx.Err()
	})
	for range 2 { // while it is being made, and before
		err := h.checkpoint(t.TempDir(), nil)
		wantError(t, err, "no space left for the images in state_dir", state, "reserve_bytes", "free some")
		h.wantStatus("RUNNING")
	}
	if err := os.Remove(other); err != nil {
		t.Fatal(err)
	}
	h.guest.Before("Checkpoint", nil)
	if err := h.checkpoint(t.TempDir(), nil); err != nil {
		t.Error(err)
	}
}

// A guest that keeps files open for writing continues to write them. It gets
// time to close them; then it can make no more.
func TestAGuestThatKeepsItsFilesOpen(t *testing.T) {
	for name, closes := range map[string]bool{"for a while": true, "indefinitely": false} {
		t.Run(name, func(t *testing.T) {
			state := t.TempDir()
			synctest.Test(t, func(t *testing.T) {
				share := &sharing{}
				e, err := newExchange(state, "ns", "c1", share.set)
				if err != nil {
					t.Fatal(err)
				}
				limits := budget.Limits{Files: 10, Bytes: 1 << 30}
				first, err := e.open(t.Context(), limits)
				if err != nil {
					t.Fatal(err)
				}
				second, err := e.open(t.Context(), limits)
				if err != nil {
					t.Fatal(err)
				}
				share.setBusy(true)
				first.close()
				time.Sleep(2 * shutTimeout) //nolint:forbidigo // in a bubble
				if !share.isWritable() || !exists(e.dir) {
					t.Error("it was closed while another operation has it open")
				}
				second.close()
				time.Sleep(shutTimeout / 2) //nolint:forbidigo // in a bubble
				share.setBusy(!closes)
				time.Sleep(shutTimeout) //nolint:forbidigo // in a bubble
				synctest.Wait()
				if exists(e.dir) != closes || share.isWritable() == closes {
					t.Errorf("the directory is there: %v, the guest can write: %v", exists(e.dir), share.isWritable())
				}
				again, err := e.open(t.Context(), limits)
				if closes {
					if err != nil {
						t.Fatal(err)
					}
					again.close()
					return
				}
				if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "recreate the container") {
					t.Errorf("the next operation: %v", err)
				}
			})
		})
	}
}

// What the host cannot change is no reason to fail; a guest that could not
// write would be.
func TestExchangeThatCannotBeChanged(t *testing.T) {
	e, err := newExchange(t.TempDir(), "ns", "c1", func(string, bool) error { return unix.EPERM })
	if err != nil {
		t.Fatal(err)
	}
	e.shut(t.Context())
	if !exists(e.dir) {
		t.Error("it was removed")
	}
	if _, err := e.open(t.Context(), budget.Limits{Files: 1, Bytes: 1}); !errors.Is(err, unix.EPERM) {
		t.Errorf("error %v", err)
	}
	if e.users != 0 {
		t.Errorf("%d operations have it open", e.users)
	}
}

// A file system without space takes directories, but nothing into files.
func TestAnExchangeDirectoryThatCannotBeMarkedIsNotLeft(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mount(2) is reserved to root")
	}
	state := t.TempDir()
	if err := unix.Mount("tmpfs", state, "tmpfs", 0, "size=4k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(state, 0) })
	if err := os.WriteFile(filepath.Join(state, "full"), make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := newExchange(state, "ns", "c1", nil); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("created: %v", err)
	}
	if dir := adjust.ExchangeDir(state, "ns", "c1"); exists(dir) {
		t.Errorf("%s is left", dir)
	}
}
