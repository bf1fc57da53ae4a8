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
