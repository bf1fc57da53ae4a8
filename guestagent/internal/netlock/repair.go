// SPDX-License-Identifier: Apache-2.0

package netlock

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
	"github.com/kata-checkpoint/kata-checkpoint/internal/pidfd"
)

// EnterRepair enables repair mode, in which a socket is closed without sending
// a FIN or RST. Otherwise the kernel would retransmit these for minutes and
// keep the connections' addresses in use. It is called after a dump, at the end
// of which CRIU disables repair mode.
func EnterRepair(list []inspect.Connection) error {
	return each(list, func(fd int) error { return setRepair(fd, unix.TCP_REPAIR_ON) })
}

// LeaveRepair undoes EnterRepair, and what a CRIU that died has left undone. The
// original value of SO_REUSEADDR, which the mode overwrites, is not known then:
// with it on, a server that restarts can bind the port of a connection.
func LeaveRepair(list []inspect.Connection) error {
	return each(list, func(fd int) error {
		mode, err := unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR)
		if err != nil || mode == unix.TCP_REPAIR_OFF {
			return os.NewSyscallError("getsockopt", err)
		}
		if err := setRepair(fd, unix.TCP_REPAIR_OFF_NO_WP); err != nil {
			return err
		}
		return os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
	})
}

// setRepair sets a socket's repair mode, in which it is closed without a packet
// (net/ipv4/tcp.c, __tcp_close).
func setRepair(fd, mode int) error {
	return os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR, mode))
}

// each calls do with a descriptor of each connection's socket.
func each(list []inspect.Connection, do func(fd int) error) error {
	for _, c := range list {
		if err := withSocket(c, do); err != nil {
			return named(c, err)
		}
	}
	return nil
}

func named(c inspect.Connection, err error) error {
	return fmt.Errorf("the TCP connection from %s to %s: %w", c.Local, c.Remote, err)
}

func withSocket(c inspect.Connection, do func(fd int) error) error {
	process, err := pidfd.Open(c.PID)
	if err != nil {
		return err
	}
	defer unix.Close(process)
	fd, err := unix.PidfdGetfd(process, c.FD, 0)
	if err != nil {
		return os.NewSyscallError("pidfd_getfd", err)
	}
	defer unix.Close(fd)
	return do(fd)
}
