// SPDX-License-Identifier: Apache-2.0

package relock

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// ptraceMask reads or sets the blocked signals of a stopped thread.
func ptraceMask(request, tid int, mask *uint64) unix.Errno {
	_, _, e := unix.Syscall6(unix.SYS_PTRACE, uintptr(request), uintptr(tid), unsafe.Sizeof(*mask), uintptr(unsafe.Pointer(mask)), 0, 0)
	return e
}
