// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"slices"
	"testing"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/ttrpc"

	"github.com/kata-checkpoint/kata-checkpoint/internal/config"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/metrics"
)

// withSpool has the service report to a spool.
func withSpool(t *testing.T) (metrics.Spool, option) {
	t.Helper()
	s := metrics.Spool{Dir: t.TempDir()}
	return s, withConfig(func(c *config.Config) { c.MetricsDir = s.Dir })
}

// reports takes what the service has reported.
func reports(t *testing.T, s metrics.Spool) metrics.Content {
	t.Helper()
	c, err := s.Take()
	if err != nil {
		t.Fatal(err)
	}
	if c.Invalid != 0 {
		t.Errorf("%d reports are invalid", c.Invalid)
	}
	return c
}

func ofOperation(c metrics.Content, operation string) (out []metrics.Report) {
	for _, r := range c.Done {
		if r.Operation == operation {
			out = append(out, r)
		}
	}
	return out
}

// A checkpoint is in progress while it is, and reported afterwards with its size
// and phases; so is the time for which the container was frozen.
func TestCheckpointIsReported(t *testing.T) {
	spool, option := withSpool(t)
	h := newHarness(t, option)
	h.run(leaveRunning)
	var during metrics.Content
	h.guest.Before("Checkpoint", func(context.Context) error {
		during = reports(t, spool)
		return nil
	})
	const parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	ctx := ttrpc.WithMetadata(t.Context(), ttrpc.MD{"traceparent": []string{parent}})
	if _, err := h.task.Pause(t.Context(), &task.PauseRequest{ID: "c1"}); err != nil {
		t.Fatal(err)
	}
	if _, err := h.task.Checkpoint(ctx, &task.CheckpointTaskRequest{ID: "c1", Path: t.TempDir()}); err != nil {
		t.Fatal(err)
	}
	if len(during.Running) != 1 || during.Running[0].Operation != metrics.Checkpoint {
		t.Errorf("during the checkpoint: %v", during)
	}
	after := reports(t, spool)
	done := ofOperation(after, metrics.Checkpoint)
	if len(done) != 1 || len(after.Running) != 0 || len(after.Done) != 1 {
		t.Fatalf("after it: %v", after)
	}
	r := done[0]
	if r.Reason != metrics.Success || r.Bytes <= 0 || r.Seconds <= 0 || r.Traceparent != parent || r.Container != "c1" || r.Namespace == "" {
		t.Errorf("%+v", r)
	}
	for _, want := range []string{"prepare", "copy images", "sync", "commit"} {
		if !slices.ContainsFunc(r.Phases, func(p metrics.Phase) bool { return p.Name == want }) {
			t.Errorf("the phase %q is missing: %v", want, r.Phases)
		}
	}
	if _, err := h.task.Resume(t.Context(), &task.ResumeRequest{ID: "c1"}); err != nil {
		t.Fatal(err)
	}
	if frozen := reports(t, spool); len(frozen.Done) != 1 || frozen.Done[0].Operation != metrics.Frozen || frozen.Done[0].Seconds < r.Seconds {
		t.Errorf("frozen: %v; the checkpoint took %v s", frozen, r.Seconds)
	}
}

// A failure is reported with the name of its code. A pause without a checkpoint
// is nobody's figure.
func TestFailuresAreReported(t *testing.T) {
	spool, option := withSpool(t)
	h := newHarness(t, option)
	h.run(nil)
	h.guest.Before("CheckCheckpoint", func(context.Context) error {
		return errclass.ToRPC(errclass.Precondition(errcode.IOUring, "the process a uses io_uring"))
	})
	if _, err := h.task.Checkpoint(t.Context(), &task.CheckpointTaskRequest{ID: "c1", Path: t.TempDir()}); err == nil {
		t.Fatal("a checkpoint was made")
	}
	if _, err := h.task.Checkpoint(t.Context(), &task.CheckpointTaskRequest{ID: "c1", Path: "relative"}); err == nil {
		t.Fatal("a checkpoint was made")
	}
	var reasons []string
	for _, r := range ofOperation(reports(t, spool), metrics.Checkpoint) {
		reasons = append(reasons, r.Reason)
	}
	slices.Sort(reasons)
	if want := []string{"io-uring", "path-not-absolute"}; !slices.Equal(reasons, want) {
		t.Errorf("the reasons are %v, not %v", reasons, want)
	}
	if _, err := h.task.Pause(t.Context(), &task.PauseRequest{ID: "c1"}); err != nil {
		t.Fatal(err)
	}
	if _, err := h.task.Resume(t.Context(), &task.ResumeRequest{ID: "c1"}); err != nil {
		t.Fatal(err)
	}
	if c := reports(t, spool); len(c.Done)+len(c.Running) != 0 {
		t.Errorf("a pause: %v", c)
	}
}

// A restore is one operation, from Create to Start; one that is refused at Create
// is reported there.
func TestRestoreIsReported(t *testing.T) {
	spool, option := withSpool(t)
	h := newHarness(t, option)
	h.create(nil, func(r *task.CreateTaskRequest) { r.Checkpoint = imageSet(t) })
	if c := reports(t, spool); len(c.Done)+len(c.Running) != 0 {
		t.Errorf("created: %v", c)
	}
	begin := time.Now()
	if _, err := h.task.Start(t.Context(), &task.StartRequest{ID: "c1"}); err != nil {
		t.Fatal(err)
	}
	done := ofOperation(reports(t, spool), metrics.Restore)
	if len(done) != 1 || done[0].Reason != metrics.Success || done[0].Seconds <= 0 || done[0].Begin.Before(begin) || done[0].Phases[0].Name != "stage images" {
		t.Errorf("restored: %v", done)
	}

	spool, option = withSpool(t)
	h = newHarness(t, option)
	if _, err := h.task.Create(t.Context(), &task.CreateTaskRequest{ID: "c1", Bundle: h.bundle(nil), Checkpoint: t.TempDir()}); err == nil {
		t.Fatal("it is created from nothing")
	}
	if done := ofOperation(reports(t, spool), metrics.Restore); len(done) != 1 || done[0].Reason != "not-image-set" {
		t.Errorf("refused: %v", done)
	}
}
