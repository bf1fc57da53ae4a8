// SPDX-License-Identifier: Apache-2.0

package placeholder

import (
	"bufio"
	"os"
	"os/exec"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// dispositions are what a process can do about SIGTERM. Each is a program that
// prints a line once it is so.
var dispositions = map[string]struct {
	program string
	handled bool
}{
	"default": {"echo ready; read line", false},
	"caught":  {"trap 'exit 5' TERM; echo ready; read line", true},
	"ignored": {"trap '' TERM; echo ready; read line", true},
}

func TestHandles(t *testing.T) {
	for name, tc := range dispositions {
		t.Run(name, func(t *testing.T) {
			cmd := exec.Command("sh", "-c", tc.program)
			pid := start(t, cmd)
			if got := handles(pid, unix.SIGTERM); got != tc.handled {
				t.Errorf("handles(SIGTERM) = %v, want %v", got, tc.handled)
			}
		})
	}
	t.Run("blocked", func(t *testing.T) {
		cmd := exec.Command(os.Args[0], "-test.run=^TestBlocksSIGTERM$")
		cmd.Env = append(os.Environ(), blockEnv+"=1")
		if pid := start(t, cmd); !handles(pid, unix.SIGTERM) {
			t.Error("a process that blocks SIGTERM does not count as handling it")
		}
	})
	t.Run("another signal", func(t *testing.T) {
		cmd := exec.Command("sh", "-c", "trap '' HUP; echo ready; read line")
		if pid := start(t, cmd); handles(pid, unix.SIGTERM) {
			t.Error("ignoring SIGHUP counts as handling SIGTERM")
		}
	})
	if handles(1<<22, unix.SIGTERM) {
		t.Error("a process that does not exist handles SIGTERM")
	}
}

const blockEnv = "TEST_BLOCK_SIGTERM"

// TestBlocksSIGTERM is no test but a process of [TestHandles].
func TestBlocksSIGTERM(t *testing.T) {
	if os.Getenv(blockEnv) == "" {
		t.Skip("started by TestHandles")
	}
	runtime.LockOSThread() // the mask is the thread's, and execve(2) keeps it
	var set unix.Sigset_t
	set.Val[0] = 1 << (uint(unix.SIGTERM) - 1)
	if err := unix.PthreadSigmask(unix.SIG_BLOCK, &set, nil); err != nil {
		t.Fatal(err)
	}
	t.Fatal(unix.Exec("/bin/sh", []string{"sh", "-c", "echo ready; read line"}, os.Environ()))
}

// start starts a program, waits for its first line, and returns its PID.
func start(t *testing.T, cmd *exec.Cmd) int {
	t.Helper()
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	if line, err := bufio.NewReader(stdout).ReadString('\n'); err != nil || line != "ready\n" {
		t.Fatalf("the program printed %q, error %v", line, err)
	}
	return cmd.Process.Pid
}
