// SPDX-License-Identifier: Apache-2.0

package pidfd

import (
	"errors"
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestWaitExit(t *testing.T) {
	start := func() (*exec.Cmd, *os.File) {
		t.Helper()
		cmd := exec.Command("sleep", "infinity")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		})
		f, err := OpenFile(cmd.Process.Pid)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return cmd, f
	}
	cmd, f := start()
	done := make(chan error, 1)
	go func() { done <- WaitExit(f) }()
	select {
	case err := <-done:
		t.Fatalf("it does not wait: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Errorf("after it was killed: %v", err)
	}

	_, f = start()
	go func() { done <- WaitExit(f) }()
	f.Close()
	if err := <-done; err == nil {
		t.Error("the process of a file that was closed has exited")
	}
}

func TestWaitAndKill(t *testing.T) {
	cmd := exec.Command("sleep", "infinity")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := cmd.Process.Pid
	fd, err := Open(pid)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if exited, err := Wait(fd, 0); exited || err != nil {
		t.Errorf("while it runs: exited %t, %v", exited, err)
	}
	begin := time.Now()
	if exited, err := Wait(fd, 50*time.Millisecond); exited || err != nil || time.Since(begin) < 45*time.Millisecond {
		t.Errorf("within a limit: exited %t after %s, %v", exited, time.Since(begin), err)
	}
	if err := Kill(fd); err != nil {
		t.Fatal(err)
	}
	if exited, err := Wait(fd, 20*time.Second); !exited || err != nil {
		t.Errorf("after it was killed: exited %t, %v", exited, err)
	}
	var status *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &status) || status.ExitCode() != -1 {
		t.Errorf("it ended with %v", err)
	}
	if err := Kill(fd); err != nil {
		t.Errorf("once it is gone: %v", err)
	}
	if _, err := Open(pid); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("open once it is gone: %v", err)
	}
}
