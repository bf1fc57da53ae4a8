// SPDX-License-Identifier: Apache-2.0

package launch

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/testproc"
	"github.com/kata-checkpoint/kata-checkpoint/internal/thread"
)

func TestLaunchDeclinesAPidThatIsTaken(t *testing.T) {
	dir := t.TempDir()
	data, err := json.Marshal(Job{Avoid: []int{1, os.Getpid()}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, JobName), data, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Run([]string{filepath.Join(dir, "criu"), "swrk", "3"}); !errors.Is(err, ErrPIDTaken) {
		t.Fatalf("error %v", err)
	}
	if said, err := os.ReadFile(filepath.Join(dir, ErrorName)); err != nil || string(said) != ErrPIDTaken.Error() {
		t.Errorf("it leaves %q (%v)", said, err)
	}
}

// CRIU finds the target's cgroup namespace in place of a process's own, and
// all its other namespaces. Nobody else sees that.
func TestShowNamespaces(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("makes namespaces: only as root")
	}
	cmd := exec.Command("/bin/sh", "-c", "echo ready; read line")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS}
	testproc.Ready(t, cmd)
	pid, self := cmd.Process.Pid, os.Getpid()
	inode := func(pid int, kind string) uint64 {
		t.Helper()
		var st unix.Stat_t
		if err := unix.Stat(fmt.Sprintf("/proc/%d/ns/%s", pid, kind), &st); err != nil {
			t.Fatal(err)
		}
		return st.Ino
	}
	entries, err := os.ReadDir("/proc/self/ns")
	if err != nil {
		t.Fatal(err)
	}
	own := make(map[string]uint64)
	for _, e := range entries {
		own[e.Name()] = inode(pid, e.Name())
	}
	dir := t.TempDir()
	job := Job{Target: self, CgroupNamespaces: []int{pid}}
	err = thread.Do(func() error {
		if err := setUpMounts(dir, job); err != nil {
			return err
		}
		if err := showNamespaces(dir, job); err != nil {
			return err
		}
		for kind, want := range own {
			if kind == "cgroup" {
				want = inode(self, kind)
			}
			if got := inode(pid, kind); got != want {
				t.Errorf("%s is %d, want %d", kind, got, want)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if inode(pid, "cgroup") != own["cgroup"] {
		t.Error("others see it, too")
	}
}

func TestOnInitramfs(t *testing.T) {
	for mounts, want := range map[string]bool{
		"rootfs / rootfs rw 0 0\nproc /proc proc rw 0 0\n":            true,
		"proc /proc proc rw 0 0\nnone / rootfs rw,size=100k 0 0\n":    true,
		"/dev/pmem0p1 / ext4 ro 0 0\nrootfs /old rootfs rw 0 0\n":     false,
		"root / overlay rw,lowerdir=/ 0 0\ntmpfs /run tmpfs rw 0 0\n": false,
		"": false,
	} {
		if got := onInitramfs(mounts); got != want {
			t.Errorf("%t for %q", got, mounts)
		}
	}
}

// The root that CRIU gets is another mount, with all that is mounted in the
// first one, and it can be pivoted out of.
func TestRootOnTop(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounts: only as root")
	}
	dir := t.TempDir()
	own, err := os.Readlink("/proc/thread-self/ns/mnt")
	if err != nil {
		t.Fatal(err)
	}
	err = thread.Do(func() error {
		if err := setUpMounts(dir, Job{}); err != nil {
			return err
		}
		inner := filepath.Join(dir, "inner")
		if err := errors.Join(os.Mkdir(inner, 0o700), unix.Mount("tmpfs", inner, "tmpfs", 0, ""), os.WriteFile(filepath.Join(inner, "file"), nil, 0o600)); err != nil {
			return err
		}
		var before, after unix.Statx_t
		if err := unix.Statx(unix.AT_FDCWD, "/", 0, unix.STATX_MNT_ID, &before); err != nil {
			return err
		}
		if err := rootOnTop(dir); err != nil {
			return err
		}
		if err := unix.Statx(unix.AT_FDCWD, "/", 0, unix.STATX_MNT_ID, &after); err != nil {
			return err
		}
		if before.Mnt_id == after.Mnt_id {
			t.Error("the root is the same mount")
		}
		if _, err := os.Stat(filepath.Join(inner, "file")); err != nil {
			t.Errorf("what was mounted: %v", err)
		}
		// As CRIU does.
		if err := errors.Join(os.Mkdir(filepath.Join(inner, "old"), 0o700), unix.Chdir(inner)); err != nil {
			return err
		}
		if err := unix.PivotRoot(".", "old"); err != nil {
			t.Errorf("pivot: %v", err)
		}
		if _, err := os.Stat("/file"); err != nil {
			t.Errorf("the new root: %v", err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if now, err := os.Readlink("/proc/thread-self/ns/mnt"); err != nil || now != own {
		t.Errorf("this test runs in %s, %v", now, err)
	}
}
