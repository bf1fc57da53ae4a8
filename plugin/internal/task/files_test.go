// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v2"

	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
	"github.com/kata-checkpoint/kata-checkpoint/internal/pidfd"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/bundle"
)

// withVirtiofsd has a process serve the VM's files, and returns what kills it.
func withVirtiofsd(t *testing.T) (option, func()) {
	t.Helper()
	cmd := exec.Command("sleep", "infinity")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	f, err := pidfd.OpenFile(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	kill := func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	t.Cleanup(kill)
	return func(h *harness) { h.virtiofsd = f }, kill
}

// What touches a file in a VM whose virtiofsd has exited never ends, whoever waits
// for it. The image set from before stays, and SIGKILL ends the container.
func TestAVMThatHasLostItsFiles(t *testing.T) {
	t.Parallel()
	serves, die := withVirtiofsd(t)
	h := newHarness(t, serves)
	h.run(leaveRunning)
	path := t.TempDir()
	if err := h.checkpoint(path, nil); err != nil {
		t.Fatal(err)
	}
	dumps := make(chan struct{})
	h.guest.Before("Checkpoint", func(ctx context.Context) error {
		close(dumps)
		<-ctx.Done()
		return ctx.Err()
	})
	failed := make(chan error, 1)
	go func() { failed <- h.checkpoint(path, nil) }()
	<-dumps
	begin := time.Now()
	die()
	wantError(t, <-failed, "virtiofsd has exited", "KC-4018")
	if took := time.Since(begin); took > h.cfg.CheckpointTimeout/2 {
		t.Errorf("the checkpoint ended after %s", took)
	}
	set, err := imageset.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer set.Close()
	if err := set.CopyTo(t.Context(), filepath.Join(t.TempDir(), "copy"), h.service.limits()); err != nil {
		t.Error(err)
	}
	wantError(t, h.checkpoint(t.TempDir(), nil), "virtiofsd has exited")

	h.kata.Before("Kill", func(ctx context.Context) error {
		<-ctx.Done()
		return ctx.Err()
	})
	go func() {
		_, _ = h.task.Kill(context.Background(), &task.KillRequest{ID: "c1", Signal: uint32(syscall.SIGKILL), All: true})
	}()
	select {
	case <-h.down.Done():
	case <-time.After(waitLimit):
		t.Error("a container that cannot be killed keeps its VM")
	}
}

// A container may be killed before anybody knows that the files are lost, and then
// nobody asks again.
func TestAKillBeforeTheFilesAreLost(t *testing.T) {
	t.Parallel()
	serves, die := withVirtiofsd(t)
	h := newHarness(t, serves)
	h.run(nil)
	h.kata.Before("Kill", func(ctx context.Context) error {
		<-ctx.Done()
		return ctx.Err()
	})
	go func() {
		_, _ = h.task.Kill(context.Background(), &task.KillRequest{ID: "c1", Signal: uint32(syscall.SIGKILL), All: true})
	}()
	eventually(t, "Kata is asked", func() bool { return h.kata.Called("Kill c1") })
	die()
	select {
	case <-h.down.Done():
	case <-time.After(waitLimit):
		t.Error("a container that cannot be killed keeps its VM")
	}
}

// A VM takes its virtiofsd with it.
func TestAVirtiofsdThatEndsWithItsVM(t *testing.T) {
	t.Parallel()
	serves, die := withVirtiofsd(t)
	h := newHarness(t, serves)
	dir := h.run(nil)
	vmm := exec.Command("true")
	if err := vmm.Start(); err != nil {
		t.Fatal(err)
	}
	if err := bundle.SetVM(dir, vmm.Process.Pid); err != nil {
		t.Fatal(err)
	}
	_ = vmm.Wait()
	die()
	select {
	case <-h.service.files.Done():
		t.Errorf("its files are lost: %v", context.Cause(h.service.files))
	case <-time.After(endsWithVM + time.Second):
	}
}

// Kata's Go shim, and a VM in which nothing hangs, end what they are asked to.
func TestWhatEndsInTimeKeepsTheVM(t *testing.T) {
	t.Parallel()
	serves, die := withVirtiofsd(t)
	h := newHarness(t, serves)
	h.run(nil)
	die()
	<-h.service.files.Done()
	if _, err := h.task.Kill(t.Context(), &task.KillRequest{ID: "c1", Signal: uint32(syscall.SIGKILL), All: true}); err != nil {
		t.Fatal(err)
	}
	h.wantStatus("STOPPED")
	if _, err := h.task.Delete(t.Context(), &task.DeleteRequest{ID: "c1"}); err != nil {
		t.Fatal(err)
	}
	select {
	case <-h.down.Done():
		t.Error("the VM was ended")
	case <-time.After(stuckGrace + time.Second):
	}
}
