package enter

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// serveFD is the spawner's end of the connection.
const serveFD = 3

// area is where the spawner reads a plan to: only what a plan fills takes
// memory. Its elements keep the plan aligned.
var area [maxPlan / unsafe.Sizeof(uintptr(0))]uintptr

// rights is a control message with the descriptors of a request.
type rights struct {
	header unix.Cmsghdr
	files  [requestFiles]int32
	_      [requestFiles % 2]int32 // padding, as CMSG_SPACE has it
}

// Serve starts what is asked for on descriptor 3 until the other end closes
// it, and returns the status to exit with. The processes are children of the
// caller's parent. Nobody but the parent can ask: the connection has no name.
//
// It calls nothing but the kernel, and allocates nothing: it runs where Go's
// runtime has not started (package entry), so that its fork has next to nothing
// to copy.
func Serve() int {
	unix.RawSyscall(unix.SYS_FCNTL, serveFD, unix.F_SETFD, unix.FD_CLOEXEC)
	for {
		var (
			one     [1]byte
			control rights
			vector  = unix.Iovec{Base: &one[0], Len: 1}
			message = unix.Msghdr{Iov: &vector, Iovlen: 1, Control: (*byte)(unsafe.Pointer(&control)), Controllen: uint64(unsafe.Sizeof(control))}
		)
		n, _, errno := unix.RawSyscall(unix.SYS_RECVMSG, serveFD, uintptr(unsafe.Pointer(&message)), unix.MSG_CMSG_CLOEXEC)
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return 1
		}
		if n == 0 {
			return 0
		}
		if control.header.Type != unix.SCM_RIGHTS || uintptr(control.header.Len) != unsafe.Sizeof(control.header)+unsafe.Sizeof(control.files) {
			return 1
		}
		start(&control.files)
		for _, fd := range control.files {
			unix.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0) //nolint:gosec // a descriptor
		}
	}
}

// start forks what is asked for and reports the first child. What becomes of
// it the children report.
func start(files *[requestFiles]int32) {
	o := order{
		base:   uintptr(unsafe.Pointer(&area)),
		stdio:  [3]uintptr{uintptr(files[requestStdio]), uintptr(files[requestStdio+1]), uintptr(files[requestStdio+2])},   //nolint:gosec // descriptors
		report: uintptr(files[requestReport]), pidfd: uintptr(files[requestTarget]), cgroup: uintptr(files[requestCgroup]), //nolint:gosec // descriptors
	}
	record := [2]uint32{stepRead}
	size, _, errno := unix.RawSyscall6(unix.SYS_PREAD64, uintptr(files[requestPlan]), o.base, unsafe.Sizeof(area), 0, 0, 0) //nolint:gosec // a descriptor
	if errno == 0 && size >= unsafe.Sizeof(plan{}) {
		p := (*plan)(unsafe.Pointer(&area))
		relocate(p.argv, o.base)
		relocate(p.envv, o.base)
		var pid uintptr
		record[0] = stepFork
		if pid, errno = p.fork(&o); errno == 0 {
			record[0], errno = recordFirst, unix.Errno(pid)
		}
	}
	record[1] = uint32(errno) //nolint:gosec // an errno, or a pid
	unix.RawSyscall(unix.SYS_WRITE, o.report, uintptr(unsafe.Pointer(&record)), recordSize)
}

// relocate makes addresses of a list of offsets in the area.
func relocate(list, base uintptr) {
	for i := list / unsafe.Sizeof(list); i < uintptr(len(area)) && area[i] != 0; i++ {
		area[i] += base
	}
}
