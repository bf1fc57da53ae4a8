// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"os/exec"
	"syscall"
	"testing"
	"time"
)

// A CRIU whose agent has died is left to finish, and killed where it does not.
func TestOutlive(t *testing.T) {
	for name, tc := range map[string]struct {
		script string
		wait   time.Duration
		killed bool
	}{
		"one that exits":    {"read line", 20 * time.Second, false},
		"one that does not": {"while :; do read line; done", 0, true},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := exec.Command("sh", "-c", tc.script)
			stdin, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			done := make(chan error, 1)
			go func() { done <- outlive(cmd.Process.Pid, time.Now().Add(tc.wait)) }()
			if !tc.killed {
				stdin.Close()
			}
			if err := <-done; err != nil {
				t.Error(err)
			}
			stdin.Close()
			_ = cmd.Wait()
			status := cmd.ProcessState.Sys().(syscall.WaitStatus)
			if killed := status.Signaled() && status.Signal() == syscall.SIGKILL; killed != tc.killed {
				t.Errorf("killed: %v", killed)
			}
		})
	}
}
