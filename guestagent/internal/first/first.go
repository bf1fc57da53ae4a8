// Package first is the first process of the pid namespace of a restored
// container whose processes were not the first in theirs: they shared their
// pod's. CRIU restores them into a pid namespace that is there, which cannot be
// without a first process, and whose other pids have to be free. The guest
// agent starts it beside the placeholder.
//
// It has no privileges, and nothing to do but what a first process is for:
// processes that have lost their parent are its children, and leave nothing
// when they end. It ends with the placeholder's pid namespace.
package first

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// sigaction is the kernel's struct: 32 bytes on 64-bit systems, the handler first.
type sigaction struct {
	handler uintptr
	rest    [3]uintptr
}

// sigIgnore is SIG_IGN.
const sigIgnore = 1

// Run does not return, unless with the status to exit with when it cannot do its part.
//
// It calls nothing but the kernel, so that it can run where Go's runtime has
// not started (package entry): the threads of that would have pids here.
func Run() int {
	// The container's processes, who can see it, have no use for a look into it.
	if _, _, errno := unix.RawSyscall(unix.SYS_PRCTL, unix.PR_SET_DUMPABLE, 0, 0); errno != 0 {
		return 1
	}
	// The kernel reaps for a parent who ignores the ends of children.
	ignore := sigaction{handler: sigIgnore}
	if _, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(unix.SIGCHLD), uintptr(unsafe.Pointer(&ignore)), 0, 8, 0, 0); errno != 0 {
		return 1
	}
	for {
		_, _, _ = unix.RawSyscall6(unix.SYS_PPOLL, 0, 0, 0, 0, 0, 0) // whatever it ends with, there is nothing to do
	}
}
