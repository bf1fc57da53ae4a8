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

	"github.com/kata-checkpoint/kata-checkpoint/internal/testproc"
	"github.com/kata-checkpoint/kata-checkpoint/internal/thread"
)

// A shell stands for Kata's shim. It mounts the directory where the guest's
// share is, and beside it the copy that virtiofsd would have in the same mount
// namespace; its child, in a namespace of its own, has copies of both.
func TestSetWritable(t *testing.T) {
	if err := thread.Do(func() error { return unix.Unshare(unix.CLONE_NEWNS) }); err != nil {
		t.Skip("needs a mount namespace: ", err)
	}
	share, dir := filepath.Join(t.TempDir(), "sb"), filepath.Join(t.TempDir(), "exchange")
	if err := os.MkdirAll(filepath.Join(dir, "below"), 0o755); err != nil {
		t.Fatal(err)
	}
	kept, served := filepath.Join(share, "mounts/c-0123-data"), filepath.Join(share, "shared/c-0123-data")
	below := filepath.Join(share, "shared/below")
	for _, d := range []string{kept, served, below} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("sh", "-c", `mount --bind "$1" "$2" && mount --bind "$1" "$3" && mount --bind "$1/below" "$4" &&
		unshare --mount sh -c 'echo mounted && exec cat'; exit`, "sh", dir, kept, served, below)
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	testproc.Ready(t, cmd)
	pid := cmd.Process.Pid
	children := descendants(pid, maxGenerations)
	if len(children) != 1 {
		t.Fatalf("descendants of %d: %v", pid, children)
	}
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	write := func(pid int, path string) (err error) {
		t.Helper()
		if derr := thread.Do(func() error {
			if err := thread.Enter(pid, "mnt"); err != nil {
				return err
			}
			err = os.WriteFile(filepath.Join(path, "f"), nil, 0o600)
			return nil
		}); derr != nil {
			t.Fatal(derr)
		}
		return err
	}
	check := func(writable bool) {
		t.Helper()
		for _, p := range append(children, pid) {
			for _, path := range []string{kept, served} {
				err := write(p, path)
				if p == pid && path == kept {
					if err != nil { // it is Protect's to change
						t.Errorf("Kata's shim writes to %s: %v", path, err)
					}
					continue
				}
				if writable && err != nil || !writable && !errors.Is(err, unix.EROFS) {
					t.Errorf("process %d writes to %s: %v", p, path, err)
				}
			}
			if err := write(p, below); err != nil {
				t.Errorf("what else is mounted: %v", err)
			}
		}
		if err := write(os.Getpid(), dir); err != nil {
			t.Errorf("the host: %v", err)
		}
	}
	set := func(writable bool) error { return setWritable(pidfd, pid, share, dir, writable) }

	check(true)
	for _, writable := range []bool{false, false, true, false} {
		if err := set(writable); err != nil {
			t.Fatal(err)
		}
		check(writable)
	}
	if err := set(true); err != nil {
		t.Fatal(err)
	}
	var open *os.File
	if err := thread.Do(func() (err error) {
		if err := thread.Enter(children[0], "mnt"); err != nil {
			return err
		}
		open, err = os.Create(filepath.Join(served, "open"))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if err := set(false); !errors.Is(err, ErrInUse) {
		t.Errorf("with a file that is open for writing: %v", err)
	}
	open.Close()
	if err := set(false); err != nil {
		t.Error(err)
	}
	check(false)
	if err := setWritable(pidfd, pid, share, t.TempDir(), false); !errors.Is(err, ErrNotShared) {
		t.Errorf("of a directory that is not shared: %v", err)
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(filepath.Dir(dir), link); err != nil {
		t.Fatal(err)
	}
	if err := setWritable(pidfd, pid, share, filepath.Join(link, filepath.Base(dir)), true); err != nil {
		t.Errorf("by way of a link: %v", err)
	}
	check(true)
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := set(false); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("of a directory that is gone: %v", err)
	}
}
