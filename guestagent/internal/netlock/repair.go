package netlock

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
)

// EnterRepair enables repair mode, in which a socket is closed without sending
// a FIN or RST. Otherwise the kernel would retransmit these for minutes and
// keep the connections' addresses in use. It is called after a dump, at the end
// of which CRIU disables repair mode.
func EnterRepair(list []inspect.Connection) error {
	return repair(list, unix.TCP_REPAIR_ON)
}

// repair sets the repair mode of sockets (net/ipv4/tcp.c, __tcp_close).
func repair(list []inspect.Connection, mode int) error {
	for _, c := range list {
		if err := setRepair(c, mode); err != nil {
			return fmt.Errorf("set the repair mode of the TCP connection from %s to %s: %w", c.Local, c.Remote, err)
		}
	}
	return nil
}

func setRepair(c inspect.Connection, mode int) error {
	process, err := unix.PidfdOpen(c.PID, 0)
	if err != nil {
		return os.NewSyscallError("pidfd_open", err)
	}
	defer unix.Close(process)
	fd, err := unix.PidfdGetfd(process, c.FD, 0)
	if err != nil {
		return os.NewSyscallError("pidfd_getfd", err)
	}
	defer unix.Close(fd)
	return os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR, mode))
}

// LeaveRepair disables repair mode without sending a window probe.
func LeaveRepair(list []inspect.Connection) error {
	return repair(list, unix.TCP_REPAIR_OFF_NO_WP)
}
