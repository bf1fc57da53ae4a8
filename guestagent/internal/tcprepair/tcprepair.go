// SPDX-License-Identifier: Apache-2.0

// Package tcprepair sets the repair mode of TCP sockets of other processes
// (net/ipv4/tcp.c). A socket in that mode is closed without sending a FIN or RST,
// and each read and write of it fails.
package tcprepair

import (
	"os"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/pidfd"
)

// With calls do with a copy of a process's descriptor.
func With(pid, fd int, do func(fd int) error) error {
	process, err := pidfd.Open(pid)
	if err != nil {
		return err
	}
	defer unix.Close(process)
	got, err := unix.PidfdGetfd(process, fd, 0)
	if err != nil {
		return os.NewSyscallError("pidfd_getfd", err)
	}
	defer unix.Close(got)
	return do(got)
}

// Enter enables repair mode.
func Enter(fd int) error { return set(fd, unix.TCP_REPAIR_ON) }

// Leave undoes Enter, and what a CRIU that died has left undone. The original value
// of SO_REUSEADDR, which the mode overwrites, is not known then: with it on, a
// server that restarts can bind the port of a connection.
func Leave(fd int) error {
	mode, err := unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR)
	if err != nil || mode == unix.TCP_REPAIR_OFF {
		return os.NewSyscallError("getsockopt", err)
	}
	if err := set(fd, unix.TCP_REPAIR_OFF_NO_WP); err != nil {
		return err
	}
	return os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
}

func set(fd, mode int) error {
	return os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR, mode))
}
