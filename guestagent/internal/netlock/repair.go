// SPDX-License-Identifier: Apache-2.0

package netlock

import (
	"fmt"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/tcprepair"
)

// EnterRepair enables repair mode, in which a socket is closed without sending
// a FIN or RST. Otherwise the kernel would retransmit these for minutes and
// keep the connections' addresses in use. It is called after a dump, at the end
// of which CRIU disables repair mode.
func EnterRepair(list []inspect.Connection) error { return each(list, tcprepair.Enter) }

// LeaveRepair undoes EnterRepair, and what a CRIU that died has left undone.
func LeaveRepair(list []inspect.Connection) error { return each(list, tcprepair.Leave) }

// each calls do with a descriptor of each connection's socket.
func each(list []inspect.Connection, do func(fd int) error) error {
	for _, c := range list {
		if err := tcprepair.With(c.PID, c.FD, do); err != nil {
			return named(c, err)
		}
	}
	return nil
}

func named(c inspect.Connection, err error) error {
	return fmt.Errorf("the TCP connection from %s to %s: %w", c.Local, c.Remote, err)
}
