package enter

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// serveFD is the spawner's end of the connection.
const serveFD = 3

// area is where the spawner reads a plan to: only what a plan fills takes
// memory. Its elements keep the plan aligned.
var area [maxPlan / unsafe.Sizeof(uintptr(0))]uintptr

// rightsHeader begins a control message with descriptors.
type rightsHeader unix.Cmsghdr

// requestRights are the descriptors of a request.
type requestRights struct {
	header rightsHeader
	files  [requestFiles]int32
	_      [requestFiles % 2]int32 // padding, as CMSG_SPACE has it
}

// stdioRights are those of a process's stdio, which follows.
type stdioRights struct {
	header rightsHeader
	files  [3]int32
	_      int32
}

// holds says whether descriptors of that size together came with the message.
//
//go:norace
//go:nosplit
func (h *rightsHeader) holds(size uintptr) bool {
	return h.Type == unix.SCM_RIGHTS && uintptr(h.Len) == unsafe.Sizeof(*h)+size
}

// receive waits for a message with descriptors. It returns 0 when there will
// be none any more.
//
//go:norace
//go:nosplit
func receive(conn uintptr, control unsafe.Pointer, size uintptr) (uintptr, syscall.Errno) {
	for {
		var (
			one     [1]byte
			vector  = unix.Iovec{Base: &one[0], Len: 1}
			message = unix.Msghdr{Iov: &vector, Iovlen: 1, Control: (*byte)(control), Controllen: uint64(size)}
		)
		n, _, errno := unix.RawSyscall(unix.SYS_RECVMSG, conn, uintptr(unsafe.Pointer(&message)), unix.MSG_CMSG_CLOEXEC)
		if errno != unix.EINTR {
			return n, errno
		}
	}
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
		var control requestRights
		n, errno := receive(serveFD, unsafe.Pointer(&control), unsafe.Sizeof(control))
		if errno != 0 {
			return 1
		}
		if n == 0 {
			return 0
		}
		if !control.header.holds(unsafe.Sizeof(control.files)) {
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
		base:  uintptr(unsafe.Pointer(&area)),
		stdio: uintptr(files[requestStdio]), report: uintptr(files[requestReport]), //nolint:gosec // descriptors
		pidfd: uintptr(files[requestTarget]), cgroup: uintptr(files[requestCgroup]), //nolint:gosec // descriptors
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
