// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/config"
)

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
