// SPDX-License-Identifier: Apache-2.0

package netlock

import (
	"errors"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
)

func TestConnectionsInRepairModeCloseSilently(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("sets a socket's repair mode: only as root")
	}
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	pair := func() (here, there net.Conn, list []inspect.Connection) {
		here, err := net.Dial("tcp4", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		if there, err = l.Accept(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { here.Close(); there.Close() })
		processes, err := inspect.Processes(t.Context(), []int{os.Getpid()})
		if err != nil {
			t.Fatal(err)
		}
		all, err := inspect.Connections(processes)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range all {
			if c.Local.String() == here.LocalAddr().String() {
				list = append(list, c)
			}
		}
		if len(list) != 1 {
			t.Fatalf("found %v", list)
		}
		return here, there, list
	}
	// What the other end notices within a time that is long for loopback.
	notices := func(there net.Conn) error {
		if err := there.SetReadDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		_, err := there.Read(make([]byte, 1))
		return err
	}

	here, there, list := pair()
	if err := EnterRepair(list); err != nil {
		t.Fatal(err)
	}
	here.Close()
	if err := notices(there); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the peer of a connection in repair mode notices %v", err)
	}

	here, there, list = pair()
	if err := errors.Join(EnterRepair(list), LeaveRepair(list)); err != nil {
		t.Fatal(err)
	}
	if _, err := here.Write([]byte{1}); err != nil {
		t.Fatal(err)
	}
	if err := notices(there); err != nil {
		t.Errorf("after the repair mode nothing arrives: %v", err)
	}
	here.Close()
	if err := notices(there); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the peer of a closed connection notices %v", err)
	}

	// With SO_REUSEADDR, a server that restarts can have the connection's port again.
	option := func(c net.Conn) (value int) {
		raw, err := c.(*net.TCPConn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		var failed error
		err = raw.Control(func(fd uintptr) { value, failed = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR) })
		if err := errors.Join(err, failed); err != nil {
			t.Fatal(err)
		}
		return value
	}
	here, _, list = pair()
	before := option(here)
	if err := LeaveRepair(list); err != nil {
		t.Fatal(err)
	}
	if got := option(here); got != before {
		t.Errorf("SO_REUSEADDR of a socket that was not in repair mode is %d, not %d", got, before)
	}
	if err := errors.Join(EnterRepair(list), LeaveRepair(list)); err != nil {
		t.Fatal(err)
	}
	if got := option(here); got != 1 {
		t.Errorf("SO_REUSEADDR after the repair mode is %d", got)
	}
}
