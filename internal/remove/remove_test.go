// SPDX-License-Identifier: Apache-2.0

package remove

import (
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

func exists(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, os.ErrNotExist)
}

func TestAll(t *testing.T) {
	dir := t.TempDir()
	outside, tree := filepath.Join(dir, "outside"), filepath.Join(dir, "tree")
	if err := os.WriteFile(outside, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for i := range 2 * batch {
		if err := os.MkdirAll(filepath.Join(tree, fmt.Sprint(i%7), fmt.Sprint(i)), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(tree, fmt.Sprint("f", i)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("..", filepath.Join(tree, "up")); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{tree, tree, filepath.Join(tree, "x", "y")} {
		if err := All(path); err != nil {
			t.Error(err)
		}
	}
	if exists(tree) || !exists(outside) {
		t.Errorf("the tree is there: %v, what is outside: %v", exists(tree), exists(outside))
	}
	if err := All(outside); err != nil || exists(outside) {
		t.Errorf("a file: %v", err)
	}
}

// deep makes a tree that no path leads to the end of.
func deep(t *testing.T, path string, levels int) {
	t.Helper()
	fd, err := unix.Open(filepath.Dir(path), unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Base(path)
	for range levels {
		if err := unix.Mkdirat(fd, name, 0o700); err != nil {
			t.Fatal(err)
		}
		next, err := unix.Openat(fd, name, unix.O_RDONLY|unix.O_DIRECTORY, 0)
		if err != nil {
			t.Fatal(err)
		}
		unix.Close(fd)
		fd, name = next, "d"
	}
	unix.Close(fd)
}

func TestDeepTreesNeedFewDescriptors(t *testing.T) {
	tree := filepath.Join(t.TempDir(), "tree")
	deep(t, tree, 500)
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 64, Max: limit.Max}); err != nil {
		t.Fatal(err)
	}
	err := All(tree)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if err != nil || exists(tree) {
		t.Errorf("error %v, still there: %v", err, exists(tree))
	}
}

// What is mounted in a tree is somebody else's.
func TestMountsStay(t *testing.T) {
	if err := thread.Do(func() error { return unix.Unshare(unix.CLONE_NEWNS) }); err != nil {
		t.Skip("needs a mount namespace: ", err)
	}
	tree, other := filepath.Join(t.TempDir(), "tree"), t.TempDir()
	kept, at := filepath.Join(other, "kept"), filepath.Join(tree, "a", "mount")
	for _, d := range []string{kept, at} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("sh", "-c", `mount --bind "$1" "$2" && echo mounted && exec cat`, "sh", other, at)
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	testproc.Ready(t, cmd)
	err := thread.Do(func() error {
		if err := thread.Enter(cmd.Process.Pid, "mnt"); err != nil {
			return err
		}
		if err := All(tree); !errors.Is(err, unix.EXDEV) && !errors.Is(err, unix.EBUSY) {
			t.Errorf("error %v", err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if !exists(kept) {
		t.Error("what is mounted was removed")
	}
}
