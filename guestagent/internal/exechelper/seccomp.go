// SPDX-License-Identifier: Apache-2.0

package exechelper

import (
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/procfs"
	"github.com/kata-checkpoint/kata-checkpoint/internal/thread"
)

// filterMode is the mode in /proc/PID/status of a process with filters.
const filterMode = "2"

// Filters returns the helper's seccomp filters, the first one first: those that
// Kata gives to each exec in the container, because that is what the helper is
// to Kata. The kernel lets a tracer read them (CONFIG_CHECKPOINT_RESTORE, which
// CRIU needs as well).
func (h *Helper) Filters() ([][]unix.SockFilter, error) {
	mode, err := procfs.Status(h.pid, "Seccomp")
	if err != nil {
		return nil, fmt.Errorf("read the seccomp mode of the exec helper: %w", err)
	}
	if mode != filterMode {
		return nil, nil
	}
	var filters [][]unix.SockFilter
	err = thread.Do(func() (err error) { // ptrace belongs to a thread
		filters, err = readFilters(h.pid)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("read the seccomp filters of the exec helper: %w", err)
	}
	return filters, nil
}

// readFilters stops a process for a moment.
func readFilters(pid int) (filters [][]unix.SockFilter, err error) {
	if err := unix.PtraceSeize(pid); err != nil {
		return nil, err
	}
	if err := unix.PtraceInterrupt(pid); err != nil {
		return nil, errclass.Join(err, unix.PtraceDetach(pid))
	}
	var ws unix.WaitStatus
	for {
		_, err := unix.Wait4(pid, &ws, unix.WALL, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, err
		}
		break
	}
	if !ws.Stopped() {
		return nil, errors.New("it has exited")
	}
	defer func() { err = errclass.Join(err, unix.PtraceDetach(pid)) }()
	for i := 0; ; i++ {
		f, err := readFilter(pid, i)
		if errors.Is(err, unix.ENOENT) {
			return filters, nil
		}
		if err != nil {
			return nil, err
		}
		filters = append(filters, f)
	}
}

// readFilter returns the filter that was set as the index-th, from 0 on
// (kernel/seccomp.c, get_nth_filter).
func readFilter(pid, index int) ([]unix.SockFilter, error) {
	// Without a buffer the call returns the number of instructions.
	n, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_SECCOMP_GET_FILTER, uintptr(pid), uintptr(index), 0, 0, 0)
	if errno != 0 {
		return nil, errno
	}
	f := make([]unix.SockFilter, n)
	_, _, errno = unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_SECCOMP_GET_FILTER, uintptr(pid), uintptr(index), uintptr(unsafe.Pointer(&f[0])), 0, 0)
	if errno != 0 {
		return nil, errno
	}
	return f, nil
}
