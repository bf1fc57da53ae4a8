// SPDX-License-Identifier: Apache-2.0

package cgroup

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestFindFollowsTheRulesOfKatasAgent(t *testing.T) {
	for name, tc := range map[string]struct {
		cgroupsPath string
		want        string
	}{
		"no path is the id":                   {"", "c1"},
		"ctr's":                               {"/default/c1", "default/c1"},
		"the CRI's on cgroupfs":               {"/kubepods/burstable/pod1/c1", "kubepods/burstable/pod1/c1"},
		"systemd's, where the agent is not 1": {"system.slice:kata:c1", "system.slice/kata-c1.scope"},
		"systemd's nested slices":             {"kubepods-burstable-pod1.slice:cri-containerd:c1", "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-c1.scope"},
		"systemd's, where the agent is 1":     {"kubepods.slice:cri-containerd:c1", "kubepods.slice/cri-containerd/c1"},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			dir := filepath.Join(root, tc.want)
			if err := os.MkdirAll(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			got, err := Find(root, tc.cgroupsPath, "c1")
			if err != nil || got != dir {
				t.Fatalf("Find = %q, %v, want %q", got, err, dir)
			}
		})
	}
	if _, err := Find(t.TempDir(), "/default/c1", "c1"); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("Find of a missing cgroup: %v", err)
	}
}

func TestProcs(t *testing.T) {
	dir := t.TempDir()
	child := filepath.Join(dir, "restored")
	if err := os.Mkdir(child, 0o755); err != nil {
		t.Fatal(err)
	}
	for d, content := range map[string]string{dir: "10\n12\n", child: "31\n"} {
		if err := os.WriteFile(filepath.Join(d, "cgroup.procs"), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for deep, want := range map[bool][]int{false: {10, 12}, true: {10, 12, 31}} {
		got, err := Procs(dir, deep)
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("Procs(deep=%v) = %v, %v, want %v", deep, got, err, want)
		}
	}
}

// A cgroup whose processes do not stop in time must not stay half frozen.
func TestFreezeGivesUpThawed(t *testing.T) {
	dir := t.TempDir()
	for file, content := range map[string]string{"cgroup.events": "populated 1\nfrozen 0\n", "cgroup.freeze": "0"} {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if err := Freeze(ctx, dir); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("Freeze = %v", err)
	}
	if frozen, err := Frozen(dir); err != nil || frozen {
		t.Fatalf("Frozen = %v, %v", frozen, err)
	}
	ctx, cancel = context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if err := Hold(ctx, dir); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("Hold = %v", err)
	}
	if frozen, err := Frozen(dir); err != nil || !frozen {
		t.Fatalf("after Hold, Frozen = %v, %v", frozen, err)
	}
	if err := Thaw(filepath.Join(dir, "gone")); err != nil {
		t.Fatalf("Thaw of a cgroup that is gone: %v", err)
	}
}

func TestRemove(t *testing.T) {
	root := t.TempDir()
	if err := unix.Mount("cgroup2", root, "cgroup2", 0, ""); err != nil {
		t.Skip("needs to mount cgroup v2: ", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(root, 0); err != nil {
			t.Error(err)
		}
	})
	dir, err := os.MkdirTemp(root, "cgroup-test-")
	if err != nil {
		t.Fatal(err)
	}
	child := filepath.Join(dir, "child", "grandchild")
	if err := os.MkdirAll(child, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	if err := write(child, "cgroup.procs", strconv.Itoa(cmd.Process.Pid)); err != nil {
		t.Fatal(err)
	}
	if err := Freeze(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	if err := Remove(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s: %v", dir, err)
	}
	if err := <-exited; err == nil {
		t.Error("the process has exited on its own")
	}
	if err := Remove(t.Context(), dir); err != nil {
		t.Errorf("once more: %v", err)
	}
}

// A process that is exiting is not listed any more, while it still closes its
// files, and keeps its cgroup from being removed.
func TestKillWaitsForProcessesThatExit(t *testing.T) {
	dir := t.TempDir()
	for file, content := range map[string]string{"cgroup.kill": "", "cgroup.procs": "", "cgroup.events": "populated 1\nfrozen 0\n"} {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	if err := Kill(ctx, dir); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Kill = %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "cgroup.events"), []byte("populated 0\nfrozen 0\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Kill(t.Context(), dir); err != nil {
		t.Error(err)
	}
}

func TestOOMKills(t *testing.T) {
	dir := t.TempDir()
	if n := OOMKills(dir); n != 0 {
		t.Errorf("without the file: %d", n)
	}
	if err := os.WriteFile(filepath.Join(dir, "memory.events"), []byte("low 0\nhigh 0\nmax 7\noom 3\noom_kill 2\noom_group_kill 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if n := OOMKills(dir); n != 2 {
		t.Errorf("%d, not 2", n)
	}
}
