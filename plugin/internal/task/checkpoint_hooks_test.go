// SPDX-License-Identifier: Apache-2.0

//go:build testhooks

package task

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v2"

	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
	"github.com/kata-checkpoint/kata-checkpoint/internal/stopat"
)

// A caller that has given up may not keep the image set: containerd removes its
// own copy. Then the container must keep running.
func TestCheckpointThatIsAbandonedAtItsEndDoesNotStop(t *testing.T) {
	for name, temporary := range map[string]bool{"directory of the caller's": false, "directory of containerd's": true} {
		t.Run(name, func(t *testing.T) {
			stops := t.TempDir()
			t.Setenv(stopat.Env, stops)
			temp := t.TempDir()
			t.Setenv("TMPDIR", temp)
			h := newHarness(t)
			h.run(nil)
			h.pause()
			path := t.TempDir()
			if temporary {
				path = filepath.Join(temp, "ctrd-checkpoint123")
				if err := os.Mkdir(path, 0o700); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.WriteFile(filepath.Join(stops, "checkpoint-commit"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			client, answer := h.task, make(chan error, 1)
			go func() {
				_, err := client.Checkpoint(t.Context(), &task.CheckpointTaskRequest{ID: "c1", Path: path})
				answer <- err
			}()
			eventually(t, "committed", func() bool { return exists(filepath.Join(stops, "checkpoint-commit.reached")) })
			h.conn.Close()
			if err := <-answer; err == nil {
				t.Error("an answer without a connection")
			}
			h.connect()
			eventually(t, "it is resumed", func() bool { return h.status() == "RUNNING" })
			if temporary {
				eventually(t, "containerd's directory", func() bool { return !exists(path) })
			} else if !exists(filepath.Join(path, imageset.ManifestName)) {
				t.Error("the image set is gone")
			}
			if calls := h.kata.Calls(); slices.ContainsFunc(calls, func(c string) bool { return strings.HasPrefix(c, "Kill") }) {
				t.Errorf("calls to Kata: %q", calls)
			}
		})
	}
}

// An image set gets its name for a caller that waits for it.
func TestCheckpointWhoseTimeRunsOutIsNotCommitted(t *testing.T) {
	stops := t.TempDir()
	t.Setenv(stopat.Env, stops)
	h := newHarness(t)
	h.run(nil)
	path := t.TempDir()
	if err := os.WriteFile(filepath.Join(stops, "checkpoint-copy-images"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	h.cfg.CheckpointTimeout = 300 * time.Millisecond
	wantError(t, h.checkpoint(path, nil), "checkpoint_timeout of 300ms has expired")
	if entries, err := os.ReadDir(path); err != nil || len(entries) > 0 {
		t.Errorf("left: %v, error %v", entries, err)
	}
	if s := h.status(); s != "RUNNING" {
		t.Errorf("it is %s", s)
	}
}
