// SPDX-License-Identifier: Apache-2.0

package kata

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/pidfd"
	"github.com/kata-checkpoint/kata-checkpoint/internal/testproc"
	"github.com/kata-checkpoint/kata-checkpoint/internal/thread"
)

// Another process mounts a directory where its shim's share is, and beside it
// the copy that virtiofsd has; what it removes there is as safe as in the copy
// it can be written.
func TestProtect(t *testing.T) {
	if err := thread.Do(func() error { return unix.Unshare(unix.CLONE_NEWNS) }); err != nil {
		t.Skip("needs a mount namespace: ", err)
	}
	share, volume := filepath.Join(t.TempDir(), "sb"), t.TempDir()
	rw, ro := filepath.Join(share, "rw/passthrough/c-0123-data"), filepath.Join(share, "ro/passthrough/c-0123-data")
	for _, d := range []string{rw, ro} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	kept := filepath.Join(volume, "kept")
	if err := os.WriteFile(kept, []byte("data"), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sh", "-c", `mount --bind "$1" "$2" && mount --bind "$1" "$3" && echo mounted && exec cat`, "sh", volume, rw, ro)
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	testproc.Ready(t, cmd)
	pid := cmd.Process.Pid
	process, err := pidfd.Open(pid)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(process)

	if err := protect(process, pid, share); err != nil {
		t.Fatal(err)
	}
	in := func(f func() error) error {
		return thread.Do(func() error {
			if err := thread.Enter(pid, "mnt"); err != nil {
				t.Error(err)
			}
			return f()
		})
	}
	if err := in(func() error { return os.RemoveAll(filepath.Join(share, "rw")) }); !errors.Is(err, unix.EROFS) {
		t.Errorf("remove the share: %v", err)
	}
	if _, err := os.Stat(kept); err != nil {
		t.Errorf("the volume's file: %v", err)
	}
	if err := in(func() error { return os.WriteFile(filepath.Join(ro, "written"), nil, 0o600) }); err != nil {
		t.Errorf("write through the copy: %v", err)
	}
	if err := protect(process, pid, share); err != nil {
		t.Errorf("once more: %v", err)
	}
	if err := in(func() error { return unix.Unmount(rw, 0) }); err != nil {
		t.Errorf("unmount: %v", err)
	}
}
