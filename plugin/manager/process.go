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
)

// endTimeout bounds the end of a process that was killed.
const endTimeout = 2 * time.Second

// StartTime is when a process started, in clock ticks after boot. With it a
// pid names one process and no later one.
func StartTime(pid int) (uint64, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The name in parentheses may hold anything.
	i := strings.LastIndexByte(string(data), ')')
	fields := strings.Fields(string(data[i+1:]))
	const startTime = 22 - 3 // proc(5) counts from 1, and pid and name are cut off
	if i < 0 || len(fields) <= startTime {
		return 0, fmt.Errorf("/proc/%d/stat cannot be read", pid)
	}
	return strconv.ParseUint(fields[startTime], 10, 64)
}

// end kills a process, if it is the one that is meant, and waits for its end.
func end(pid int, isMeant func() bool) error {
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
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return os.NewSyscallError("pidfd_send_signal", err)
	}
	for deadline := time.Now().Add(endTimeout); ; {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}} //nolint:gosec // a descriptor
		n, err := unix.Poll(fds, max(0, int(time.Until(deadline).Milliseconds())))
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return os.NewSyscallError("poll", err)
		case n == 0:
			return fmt.Errorf("process %d does not end", pid)
		}
		return nil
	}
}

// killKata kills the daemon of Kata's shim that was started in a bundle. Both
// of Kata's shims write its pid to shim.pid there, and it keeps the bundle as
// its working directory.
func killKata(dir string) error {
	data, err := os.ReadFile(filepath.Join(dir, "shim.pid"))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("end Kata's shim: %w", err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(data)))
	if err != nil {
		return fmt.Errorf("end Kata's shim: shim.pid: %w", err)
	}
	if err := end(pid, func() bool { return worksIn(pid, dir) }); err != nil {
		return fmt.Errorf("end Kata's shim: %w", err)
	}
	return nil
}

func worksIn(pid int, dir string) bool {
	cwd, err := os.Stat(fmt.Sprintf("/proc/%d/cwd", pid))
	if err != nil {
		return false
	}
	want, err := os.Stat(dir)
	return err == nil && os.SameFile(cwd, want)
}
