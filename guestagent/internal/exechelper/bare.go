package exechelper

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// siginfoSize is that of struct signalfd_siginfo, which begins with the signal.
const siginfoSize = 128

// RunBare is [Run] for where Go's runtime has not started (package entry): it
// calls nothing but the kernel, and allocates nothing.
func RunBare() int {
	var (
		all     = ^uint64(0)
		ends    [2]int32
		message [Size / 4]uint32
		info    [siginfoSize / 4]uint32
		fds     [2]unix.PollFd
		pid     uintptr
		n       uintptr
		errno   uintptr
		path    [len(executable) + 1]byte // which ends with a zero
	)
	for i := range len(executable) {
		path[i] = executable[i]
	}
	// Blocked signals wait until there is a process to pass them on to.
	if _, _, e := unix.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&all)), 0, unsafe.Sizeof(all), 0, 0); e != 0 {
		return statusFailure
	}
	signals, _, e := unix.RawSyscall6(unix.SYS_SIGNALFD4, ^uintptr(0), uintptr(unsafe.Pointer(&all)), unsafe.Sizeof(all), unix.SFD_CLOEXEC, 0, 0)
	if e != 0 {
		return statusFailure
	}
	if _, _, e := unix.RawSyscall(unix.SYS_PIPE2, uintptr(unsafe.Pointer(&ends)), unix.O_CLOEXEC, 0); e != 0 {
		return statusFailure
	}
	if _, _, e := unix.RawSyscall(unix.SYS_DUP3, uintptr(ends[1]), StatusFD, unix.O_CLOEXEC); e != 0 { //nolint:gosec // a descriptor
		return statusFailure
	}
	unix.RawSyscall(unix.SYS_CLOSE, uintptr(ends[1]), 0, 0) //nolint:gosec // a descriptor
	if n, _, e = unix.RawSyscall6(unix.SYS_OPENAT, ^uintptr(99), uintptr(unsafe.Pointer(&path)), unix.O_RDONLY|unix.O_CLOEXEC, 0, 0, 0); e == 0 {
		unix.RawSyscall(unix.SYS_CLOSE, n, 0, 0) // the agent has heard it
	}

	fds[0] = unix.PollFd{Fd: ends[0], Events: unix.POLLIN}
	fds[1] = unix.PollFd{Fd: -1, Events: unix.POLLIN}
	for {
		if _, _, e := unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&fds)), uintptr(len(fds)), 0, 0, 0, 0); e != 0 && e != unix.EINTR {
			return statusFailure
		}
		if fds[0].Revents != 0 {
			n, _, e = unix.RawSyscall(unix.SYS_READ, uintptr(ends[0]), uintptr(unsafe.Pointer(&message)), Size) //nolint:gosec // a descriptor
			errno = uintptr(e)
			switch {
			case errno == uintptr(unix.EINTR):
			case errno != 0 || n != Size: // the agent writes messages in one piece
				return statusLost
			case message[1] != 0:
				return exitStatus(unix.WaitStatus(message[2]))
			default:
				pid = uintptr(message[0])
				fds[1].Fd = int32(signals) //nolint:gosec // a descriptor
				// With the agent's copy as the only writer, its end shows as an end of file.
				unix.RawSyscall(unix.SYS_CLOSE, StatusFD, 0, 0)
			}
		}
		if fds[1].Revents != 0 {
			n, _, _ = unix.RawSyscall(unix.SYS_READ, signals, uintptr(unsafe.Pointer(&info)), siginfoSize)
			if n == siginfoSize && info[0] != uint32(unix.SIGCHLD) {
				unix.RawSyscall(unix.SYS_KILL, pid, uintptr(info[0]), 0) // gone already, or told
			}
		}
	}
}
