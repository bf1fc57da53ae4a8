// SPDX-License-Identifier: Apache-2.0

package exechelper

import (
	"errors"
	"os"
	"os/exec"
	"os/signal"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/testhelper"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/pidfd"
)

// The helper passes signals on to the process that it is told of and exits as
// that does.
func TestHelper(t *testing.T) {
	binary := testhelper.Build(t)
	t.Run("signals and exit status", func(t *testing.T) {
		cmd, status := start(t, binary)
		signals := make(chan os.Signal, 1)
		signal.Notify(signals, unix.SIGUSR1)
		defer signal.Stop(signals)
		// It comes before there is a process, and waits.
		if err := cmd.Process.Signal(unix.SIGUSR1); err != nil {
			t.Fatal(err)
		}
		tell(t, status, Message{PID: int32(os.Getpid())})
		passedOn(t, signals)
		for deadline := time.Now().Add(10 * time.Second); has(cmd.Process.Pid, StatusFD); {
			if time.Now().After(deadline) {
				t.Fatal("it keeps its own end of the pipe")
			}
		}
		if err := cmd.Process.Signal(unix.SIGUSR1); err != nil {
			t.Fatal(err)
		}
		passedOn(t, signals)
		tell(t, status, Message{Ended: 1, Status: 7 << 8})
		exits(t, cmd, 7)
	})
	t.Run("killed process", func(t *testing.T) {
		cmd, status := start(t, binary)
		tell(t, status, Message{Ended: 1, Status: uint32(unix.SIGTERM)})
		exits(t, cmd, 128+int(unix.SIGTERM))
	})
	t.Run("agent that has exited", func(t *testing.T) {
		cmd, status := start(t, binary)
		tell(t, status, Message{PID: int32(os.Getpid())})
		status.Close()
		exits(t, cmd, 255)
	})
}

func passedOn(t *testing.T, signals <-chan os.Signal) {
	t.Helper()
	select {
	case <-signals:
	case <-time.After(10 * time.Second):
		t.Fatal("the signal was not passed on")
	}
}

func exits(t *testing.T, cmd *exec.Cmd, want int) {
	t.Helper()
	_ = cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != want {
		t.Errorf("it exited with %d, want %d", code, want)
	}
}

// start runs a helper and takes its pipe when it is told to, as the agent does.
func start(t *testing.T, binary string) (*exec.Cmd, *os.File) {
	t.Helper()
	watch, err := unix.InotifyInit1(unix.IN_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(watch)
	if _, err := unix.InotifyAddWatch(watch, binary, unix.IN_CLOSE_NOWRITE); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary, api.ExecMode, "token")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	process, err := pidfd.Open(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(process)
	fds := []unix.PollFd{{Fd: int32(watch), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 10000)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if n != 1 || err != nil {
			t.Fatalf("it does not tell that it has a pipe: %v", err)
		}
		if _, err := unix.Read(watch, make([]byte, unix.SizeofInotifyEvent)); err != nil {
			t.Fatal(err)
		}
		if fd, err := unix.PidfdGetfd(process, StatusFD, 0); err == nil {
			return cmd, os.NewFile(uintptr(fd), "status")
		}
	}
}

func has(pid, fd int) bool {
	process, err := pidfd.Open(pid)
	if err != nil {
		return false
	}
	defer unix.Close(process)
	own, err := unix.PidfdGetfd(process, fd, 0)
	unix.Close(own)
	return err == nil
}

func tell(t *testing.T, status *os.File, m Message) {
	t.Helper()
	if _, err := status.Write(m.Encode()); err != nil {
		t.Fatal(err)
	}
}
