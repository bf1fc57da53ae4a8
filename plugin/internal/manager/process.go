package manager

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/bundle"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/kata"
)

// endTimeout bounds the end of a process that was killed.
const endTimeout = 2 * time.Second

// withProcess calls f with a descriptor of a process, if that is there and the
// one that is meant.
func withProcess(pid int, isMeant func() bool, f func(pidfd int) error) error {
	if pid <= 1 {
		return nil
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return os.NewSyscallError("pidfd_open", err)
	}
	defer unix.Close(fd)
	// The descriptor is of one process: what holds of the pid now, while that
	// lives, holds of it.
	if !isMeant() {
		return nil
	}
	return f(fd)
}

// end kills a process, if it is the one that is meant and has not ended by
// itself within a grace time, and waits for its end.
func end(pid int, grace time.Duration, isMeant func() bool) error {
	return withProcess(pid, isMeant, func(fd int) error {
		if ended, err := waitEnd(fd, grace); ended || err != nil {
			return err
		}
		if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			return os.NewSyscallError("pidfd_send_signal", err)
		}
		ended, err := waitEnd(fd, endTimeout)
		if err == nil && !ended {
			err = fmt.Errorf("process %d does not end", pid)
		}
		return err
	})
}

// waitEnd says whether a process ends within a time.
func waitEnd(pidfd int, limit time.Duration) (bool, error) {
	for deadline := time.Now().Add(limit); ; {
		fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}} //nolint:gosec // a descriptor
		n, err := unix.Poll(fds, max(0, int(time.Until(deadline).Milliseconds())))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return n > 0, os.NewSyscallError("poll", err)
	}
}

// EndKata kills the daemon of Kata's shim that was started in a sandbox's
// bundle, and its VM, and removes what is then left of its share.
func EndKata(dir, sandbox string) error {
	return errors.Join(killKata(dir, 0), endVM(dir, sandbox, time.Now().Add(endTimeout)), kata.Sweep(sandbox))
}

// endVM kills the VM of a sandbox whose Kata is gone, and waits until nothing
// is left of it: Kata's delete takes a VMM that nobody has reaped yet for one
// that runs, and waits for its agent until containerd kills it
// (src/runtime/virtcontainers/hypervisor.go, IsHypervisorRunning).
func endVM(dir, sandbox string, until time.Time) error {
	pid, start, err := bundle.VM(dir)
	if err != nil || pid == 0 {
		return err
	}
	is := func() bool {
		t, err := bundle.StartTime(pid)
		return err == nil && t == start
	}
	if !is() {
		return nil
	}
	if !isZombie(pid) {
		// Every VMM of Kata's has the sandbox's name in its arguments: in the path
		// of its API socket, or as its own name.
		if err := end(pid, 0, func() bool { return is() && hasArgument(pid, sandbox) }); err != nil {
			return fmt.Errorf("end the VM: %w", err)
		}
	}
	for is() && isZombie(pid) {
		if time.Now().After(until) {
			return fmt.Errorf("the VM's process %d has ended and nobody reaps it", pid)
		}
		<-time.After(5 * time.Millisecond)
	}
	return nil
}

// hasArgument says whether a text is part of a process's command line.
func hasArgument(pid int, text string) bool {
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return err == nil && strings.Contains(string(line), text)
}

func isZombie(pid int) bool {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	i := strings.LastIndexByte(string(data), ')')
	return err == nil && i >= 0 && strings.HasPrefix(string(data[i+1:]), " Z")
}

// killKata kills the daemon of Kata's shim that was started in a bundle. It may
// end by itself within a grace time.
func killKata(dir string, grace time.Duration) error {
	pid, err := kataPID(dir)
	if err == nil {
		err = end(pid, grace, func() bool { return worksIn(pid, dir) })
	}
	if err != nil {
		return fmt.Errorf("end Kata's shim: %w", err)
	}
	return nil
}

// kataPID reads which process the daemon of Kata's shim is that was started in a
// bundle; 0 where it is not known. Both of Kata's shims write it to shim.pid
// there, and keep the bundle as their working directory.
func kataPID(dir string) (int, error) {
	data, err := os.ReadFile(filepath.Join(dir, "shim.pid"))
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(data)))
	if err != nil {
		return 0, fmt.Errorf("shim.pid: %w", err)
	}
	return pid, nil
}

// ProtectShare keeps the daemon of Kata's shim that was started in a sandbox's
// bundle from removing the files of what it shares with the guest, see
// [kata.Protect].
func ProtectShare(dir, sandbox string) error {
	pid, err := kataPID(dir)
	if err != nil {
		return err
	}
	return withProcess(pid, func() bool { return worksIn(pid, dir) }, func(pidfd int) error { return kata.Protect(pidfd, pid, sandbox) })
}

func worksIn(pid int, dir string) bool {
	cwd, err := os.Stat(fmt.Sprintf("/proc/%d/cwd", pid))
	if err != nil {
		return false
	}
	want, err := os.Stat(dir)
	return err == nil && os.SameFile(cwd, want)
}
