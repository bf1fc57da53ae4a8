// SPDX-License-Identifier: Apache-2.0

package netlock

import (
	"errors"
	"net"
	"os"
	"slices"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
)

// However early a connection is given up whose keepalive probes are not
// answered, it outlives a lock.
func TestALockedConnectionOutlivesItsKeepalive(t *testing.T) {
	inNetworkNamespace(t)
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	probing, there := connect(t, l)
	ends := []net.Conn{probing, there}
	var list []inspect.Connection
	for i, c := range ends {
		onSocket(t, c, func(fd int) error {
			list = append(list, inspect.Connection{PID: os.Getpid(), FD: fd, Local: addrPort(c.LocalAddr()), Remote: addrPort(c.RemoteAddr())})
			if i == 1 {
				return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 0) // Go enables it
			}
			for _, name := range []int{unix.TCP_KEEPIDLE, unix.TCP_KEEPINTVL, unix.TCP_KEEPCNT} {
				if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, name, 1); err != nil {
					return err
				}
			}
			return nil
		})
	}
	had, err := KeepAlive(list)
	if err != nil {
		t.Fatal(err)
	}
	if want := []Endpoints{{list[0].Local, list[0].Remote}}; !slices.Equal(had, want) {
		t.Errorf("keepalive have %v, not %v", had, want)
	}
	err = Lock("test", list)
	if errors.Is(err, unix.EPROTONOSUPPORT) {
		t.Skipf("the kernel has no nf_tables: %v", err)
	}
	if err := errors.Join(err, SetKeepAlive(list, had, false)); err != nil {
		t.Fatal(err)
	}
	// It would have been given up after two seconds.
	_ = probing.SetReadDeadline(time.Now().Add(4 * time.Second))
	if _, err := probing.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("while it is locked, the connection ends: %v", err)
	}
	if err := errors.Join(Unlock("test"), SetKeepAlive(list, had, true)); err != nil {
		t.Fatal(err)
	}
	if again, err := KeepAlive(list); err != nil || !slices.Equal(again, had) {
		t.Errorf("after the lock keepalive have %v (%v), not %v", again, err, had)
	}
	if !arrives(t, there, probing) {
		t.Error("nothing arrives after the lock")
	}
}

func onSocket(t *testing.T, c net.Conn, do func(fd int) error) {
	t.Helper()
	raw, err := c.(syscall.Conn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var failed error
	if err := errors.Join(raw.Control(func(fd uintptr) { failed = do(int(fd)) }), failed); err != nil {
		t.Fatal(err)
	}
}
