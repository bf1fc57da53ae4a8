// SPDX-License-Identifier: Apache-2.0

// Package pidfd waits for and signals processes by a descriptor, which names one
// process for as long as it is open, whatever happens to its pid.
package pidfd

import (
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Open returns a pidfd of a process. Its error wraps [os.ErrProcessDone] where
// there is no such process. The caller makes sure that the process is the one
// that is meant: what is true of the pid afterwards, while the process runs, is
// true of the descriptor's process.
func Open(pid int) (int, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return -1, os.ErrProcessDone
	}
	return fd, os.NewSyscallError("pidfd_open", err)
}

// Wait waits until a process has exited, and reports whether it has within a
// limit. It does not reap.
func Wait(fd int, limit time.Duration) (exited bool, err error) {
	for deadline := time.Now().Add(limit); ; {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}} //nolint:gosec // a descriptor
		n, err := unix.Poll(fds, max(0, int(time.Until(deadline).Milliseconds())))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return n > 0, os.NewSyscallError("poll", err)
	}
}

// OpenFile returns a pidfd of a process for [WaitExit]; see [Open].
func OpenFile(pid int) (*os.File, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) {
		return nil, os.ErrProcessDone
	}
	if err != nil {
		return nil, os.NewSyscallError("pidfd_open", err)
	}
	return os.NewFile(uintptr(fd), "pidfd"), nil
}

// WaitExit waits until the process of a file of [OpenFile] has exited, or the file
// is closed, which is an error. It occupies no thread meanwhile.
func WaitExit(f *os.File) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = conn.Read(func(fd uintptr) bool {
		exited, err := Wait(int(fd), 0)
		failed = err
		return exited || err != nil
	})
	if err == nil {
		err = failed
	}
	return err
}

// Kill sends SIGKILL to a process. That it has exited is no error.
func Kill(fd int) error {
	err := Signal(fd, unix.SIGKILL)
	if errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	return err
}

// Signal sends a signal to a process. Its error wraps [os.ErrProcessDone] where
// the process has exited and was reaped.
func Signal(fd int, sig unix.Signal) error {
	err := unix.PidfdSendSignal(fd, sig, nil, 0)
	if errors.Is(err, unix.ESRCH) {
		return os.ErrProcessDone
	}
	return os.NewSyscallError("pidfd_send_signal", err)
}
