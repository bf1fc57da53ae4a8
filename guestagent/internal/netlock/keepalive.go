// SPDX-License-Identifier: Apache-2.0

package netlock

import (
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/tcprepair"
)

// Endpoints identify a connection, as one of its ends has it.
type Endpoints struct {
	Local  netip.AddrPort `json:"local"`
	Remote netip.AddrPort `json:"remote"`
}

// KeepAlive returns those of the connections that have SO_KEEPALIVE. The kernel
// gives them up when none of their probes is answered, as happens while they are
// locked: a client of Node.js sends the first after a second, and waits for eleven
// in all.
func KeepAlive(list []inspect.Connection) (out []Endpoints, err error) {
	for _, c := range list {
		err := tcprepair.With(c.PID, c.FD, func(fd int) error {
			on, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE)
			if on != 0 {
				out = append(out, Endpoints{c.Local, c.Remote})
			}
			return os.NewSyscallError("getsockopt", err)
		})
		if err != nil {
			return nil, named(c, err)
		}
	}
	return out, nil
}

// SetKeepAlive sets SO_KEEPALIVE of those connections that are among some. The
// next probe is sent when it is due, by the time at which the connection was last
// heard from.
func SetKeepAlive(list []inspect.Connection, some []Endpoints, on bool) error {
	value := 0
	if on {
		value = 1
	}
	among := make(map[Endpoints]bool, len(some))
	for _, e := range some {
		among[e] = true
	}
	for _, c := range list {
		if !among[Endpoints{c.Local, c.Remote}] {
			continue
		}
		err := tcprepair.With(c.PID, c.FD, func(fd int) error {
			return os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, value))
		})
		if err != nil {
			return named(c, err)
		}
	}
	return nil
}
