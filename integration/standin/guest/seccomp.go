// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// firstFilter returns the seccomp filter that a process was started with: for a
// container's init, the one of its profile. Kata's agent makes it of the profile
// for each exec; here runc has. The caller is locked to its thread.
func firstFilter(pid int) ([]unix.SockFilter, error) {
	if err := unix.PtraceSeize(pid); err != nil {
		return nil, err
	}
	defer unix.PtraceDetach(pid) //nolint:errcheck // it may have exited
	if err := unix.PtraceInterrupt(pid); err != nil {
		return nil, err
	}
	var ws unix.WaitStatus
	for {
		_, err := unix.Wait4(pid, &ws, unix.WALL, nil)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EINTR) {
			return nil, err
		}
	}
	if !ws.Stopped() {
		return nil, errors.New("it has exited")
	}
	// Without a buffer the call returns the number of instructions.
	get := func(buffer unsafe.Pointer) (int, error) {
		n, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_SECCOMP_GET_FILTER, uintptr(pid), 0, uintptr(buffer), 0, 0)
		if errno != 0 {
			return 0, os.NewSyscallError("ptrace", errno)
		}
		return int(n), nil
	}
	n, err := get(nil)
	if err != nil {
		return nil, err
	}
	filter := make([]unix.SockFilter, n)
	_, err = get(unsafe.Pointer(&filter[0]))
	return filter, err
}

// setFilter gives a filter to this thread, and so to what it forks.
func setFilter(filter []unix.SockFilter) error {
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	_, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&program)))
	runtime.KeepAlive(filter)
	if errno != 0 {
		return fmt.Errorf("set the seccomp filter: %w", os.NewSyscallError("seccomp", errno))
	}
	return nil
}
