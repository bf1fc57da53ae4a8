package netlock

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
)

// EnterRepair has the kernel drop the sockets of a silent container
// without a farewell when their process ends. Else it would go on sending one
// to the peers for minutes, and keep the addresses of the connections. It
// comes after a dump: CRIU itself changes the sockets back at its end.
func EnterRepair(list []inspect.Connection) error {
	return repair(list, unix.TCP_REPAIR_ON)
}

// repair sets sockets' repair mode, in which they are closed without a packet
// (net/ipv4/tcp.c, __tcp_close).
func repair(list []inspect.Connection, mode int) error {
	for _, c := range list {
		if err := setRepair(c, mode); err != nil {
			return fmt.Errorf("the TCP connection from %s to %s: %w", c.Local, c.Remote, err)
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

// LeaveRepair undoes EnterRepair.
func LeaveRepair(list []inspect.Connection) error {
	return repair(list, unix.TCP_REPAIR_OFF_NO_WP)
}
