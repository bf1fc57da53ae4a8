package exechelper

import (
	"errors"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The helper passes signals on to the process that it is told of and ends as
// that does, whether or not its binary has the entry point of its own.
func TestHelper(t *testing.T) {
	binaries := map[string]string{"on Go's runtime": build(t)}
	if runtime.GOARCH == "amd64" {
		binaries["before Go's runtime"] = build(t, "-ldflags=-E github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/entry.start")
	}
	for name, binary := range binaries {
		t.Run(name, func(t *testing.T) {
			cmd, status := start(t, binary)
			signals := make(chan os.Signal, 1)
			signal.Notify(signals, unix.SIGUSR1)
			defer signal.Stop(signals)
			tell(t, status, Message{PID: int32(os.Getpid())})
			for deadline := time.Now().Add(10 * time.Second); has(cmd.Process.Pid, StatusFD); {
				if time.Now().After(deadline) {
					t.Fatal("it keeps its own end of the pipe")
				}
			}
			if err := cmd.Process.Signal(unix.SIGUSR1); err != nil {
				t.Fatal(err)
			}
			select {
			case <-signals:
			case <-time.After(10 * time.Second):
				t.Fatal("the signal was not passed on")
			}
			tell(t, status, Message{Ended: 1, Status: 7 << 8})
			_ = cmd.Wait()
			if code := cmd.ProcessState.ExitCode(); code != 7 {
				t.Errorf("it ended with %d, want the process's 7", code)
			}

			cmd, status = start(t, binary)
			tell(t, status, Message{Ended: 1, Status: uint32(unix.SIGTERM)})
			_ = cmd.Wait()
			if code := cmd.ProcessState.ExitCode(); code != 128+int(unix.SIGTERM) {
				t.Errorf("it ended with %d for a process that SIGTERM ended", code)
			}

			cmd, status = start(t, binary)
			tell(t, status, Message{PID: int32(os.Getpid())})
			status.Close()
			_ = cmd.Wait()
			if code := cmd.ProcessState.ExitCode(); code != statusLost {
				t.Errorf("it ended with %d without an agent, want %d", code, statusLost)
			}
		})
	}
	t.Run("other modes", func(t *testing.T) {
		for name, binary := range binaries {
			if out, err := exec.Command(binary, "--version").Output(); err != nil || !strings.HasPrefix(string(out), "kata-checkpoint-agent") {
				t.Errorf("%s: --version: %q, %v", name, out, err)
			}
		}
	})
}

func build(t *testing.T, flags ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "agent")
	cmd := exec.Command("go", append(append([]string{"build", "-o", path}, flags...), "../../../cmd/kata-checkpoint-agent")...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return path
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
	cmd := exec.Command(binary, "exec", "token")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	pidfd, err := unix.PidfdOpen(cmd.Process.Pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
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
		// A package that reads its own executable when it starts tells something, too.
		if fd, err := unix.PidfdGetfd(pidfd, StatusFD, 0); err == nil {
			return cmd, os.NewFile(uintptr(fd), "status")
		}
	}
}

func has(pid, fd int) bool {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return false
	}
	defer unix.Close(pidfd)
	own, err := unix.PidfdGetfd(pidfd, fd, 0)
	unix.Close(own)
	return err == nil
}

func tell(t *testing.T, status *os.File, m Message) {
	t.Helper()
	if _, err := status.Write(m.Encode()); err != nil {
		t.Fatal(err)
	}
}
