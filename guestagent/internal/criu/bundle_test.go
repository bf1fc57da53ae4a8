// SPDX-License-Identifier: Apache-2.0

package criu

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/thread"
)

// A process of a container can open the program that an exec's process runs. Once
// that has exited, nothing but the mount keeps it from writing to the program.
func TestPrograms(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounts: only as root")
	}
	bundle := t.TempDir()
	sleep, err := os.ReadFile("/bin/sleep")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"criu/bin/criu", "bin/" + filepath.Base(Helper), "bin/" + filepath.Base(Launcher)} {
		path := filepath.Join(bundle, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, sleep, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	err = thread.Do(func() error {
		if err := ownRun(); err != nil {
			return err
		}
		for range 2 { // an agent that is started again loads them again
			if err := Load(bundle); err != nil {
				return err
			}
			for _, program := range []string{Helper, Launcher} {
				if err := overwriteExecutable(program); !errors.Is(err, unix.EROFS) {
					t.Errorf("writing to %s, the program of a process that has exited: %v", program, err)
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// ownRun gives the calling thread a mount namespace with an empty /run.
func ownRun() error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("make a mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("tmpfs", "/run", "tmpfs", 0, ""); err != nil {
		return fmt.Errorf("mount /run: %w", err)
	}
	return os.Mkdir(api.StateDir, 0o700)
}

// overwriteExecutable opens a program by a process that runs it, and for writing
// once that has exited.
func overwriteExecutable(program string) error {
	cmd := exec.Command(program, "60")
	if err := cmd.Start(); err != nil {
		return err
	}
	exe, err := unix.Open(fmt.Sprintf("/proc/%d/exe", cmd.Process.Pid), unix.O_PATH|unix.O_CLOEXEC, 0)
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if err != nil {
		return err
	}
	defer unix.Close(exe)
	f, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", exe), os.O_WRONLY, 0)
	if err == nil {
		f.Close()
	}
	return err
}
