// SPDX-License-Identifier: Apache-2.0

package netlock

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
)

// The first thread is what /proc/self shows. It is the main goroutine's, so
// that no test leaves it in another network namespace.
func init() { runtime.LockOSThread() }

// inNetworkNamespace runs a test on a thread with a network of its own.
func inNetworkNamespace(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("makes a network namespace: only as root")
	}
	runtime.LockOSThread() // never unlocked: the thread exits with the test
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		t.Fatal(err)
	}
}

func TestLock(t *testing.T) {
	inNetworkNamespace(t)
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		l, err := net.Listen("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		here, there := connect(t, l)
		other, otherThere := connect(t, l)
		if !arrives(t, here, there) {
			t.Fatal("nothing arrives, without a lock")
		}
		err = Lock("test", []inspect.Connection{{Local: addrPort(here.LocalAddr()), Remote: addrPort(here.RemoteAddr())}})
		if errors.Is(err, unix.EPROTONOSUPPORT) {
			t.Skipf("the kernel has no nf_tables: %v", err)
		}
		if err != nil {
			t.Fatal(err)
		}
		if arrives(t, here, there) {
			t.Error("what is sent arrives, in spite of the lock")
		}
		if !arrives(t, other, otherThere) {
			t.Error("the lock stops other connections, too")
		}
		// Its peer does not notice that a locked connection is closed either.
		here.Close()
		if closed(there) {
			t.Error("the peer notices the close")
		}
		if err := Unlock("test"); err != nil {
			t.Fatal(err)
		}
		if !arrives(t, other, otherThere) {
			t.Error("nothing arrives after the lock")
		}
	}
	if err := Unlock("test"); err != nil {
		t.Errorf("a lock that is not there: %v", err)
	}
}

// A CRIU that has died leaves its table, which is named after its run or a part of
// the run's id.
func TestRemoveStale(t *testing.T) {
	inNetworkNamespace(t)
	lock := func(names ...string) {
		t.Helper()
		for _, name := range names {
			err := Lock(name, nil)
			if errors.Is(err, unix.EPROTONOSUPPORT) {
				t.Skipf("the kernel has no nf_tables: %v", err)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	left := func() (names []string) {
		t.Helper()
		conn, err := nftables.New()
		if err != nil {
			t.Fatal(err)
		}
		tables, err := conn.ListTables()
		if err != nil {
			t.Fatal(err)
		}
		for _, table := range tables {
			names = append(names, table.Name)
		}
		slices.Sort(names)
		return names
	}
	lock("CRIU-0123456789", "CRIU-abcdef", "kata-checkpoint-c", "CRIU")
	if err := RemoveStale("abcdef-and-more"); err != nil {
		t.Fatal(err)
	}
	if got, want := left(), []string{"CRIU", "CRIU-0123456789", "kata-checkpoint-c"}; !slices.Equal(got, want) {
		t.Errorf("of one run: left %v, not %v", got, want)
	}
	lock("CRIU-abcdef")
	if err := RemoveStale(""); err != nil {
		t.Fatal(err)
	}
	if got, want := left(), []string{"CRIU", "kata-checkpoint-c"}; !slices.Equal(got, want) {
		t.Errorf("of all runs: left %v, not %v", got, want)
	}
}

// CRIU puts a FIN into the queue of a socket that it restores by a packet, which
// has a mark of its own.
func TestLockLetsCRIUsPacketsThrough(t *testing.T) {
	inNetworkNamespace(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	here, there := connect(t, l)
	err = Lock("test", []inspect.Connection{{Local: addrPort(here.LocalAddr()), Remote: addrPort(here.RemoteAddr())}})
	if errors.Is(err, unix.EPROTONOSUPPORT) {
		t.Skipf("the kernel has no nf_tables: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	raw, err := here.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	mark := func(value int) {
		t.Helper()
		var failed error
		err := raw.Control(func(fd uintptr) { failed = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, value) })
		if err := errors.Join(err, failed); err != nil {
			t.Fatal(err)
		}
	}
	mark(1)
	if arrives(t, here, there) {
		t.Error("a packet with another mark arrives")
	}
	mark(0xc114)
	if !arrives(t, here, there) {
		t.Error("a packet of CRIU's does not arrive")
	}
}

// A lock is one batch, however many connections it has, and replaces an earlier one.
func TestLockOfManyConnections(t *testing.T) {
	inNetworkNamespace(t)
	list := make([]inspect.Connection, 0, 5000)
	for i := range cap(list) {
		local, remote := "10.0.0.2", "10.0.0.1"
		if i%2 == 1 {
			local, remote = "2001:db8::2", "2001:db8::1"
		}
		list = append(list, inspect.Connection{
			Local:  netip.AddrPortFrom(netip.MustParseAddr(local), 80),
			Remote: netip.AddrPortFrom(netip.MustParseAddr(remote), uint16(1024+i)),
		})
	}
	for _, n := range []int{len(list), 10} {
		err := Lock("test", list[:n])
		if errors.Is(err, unix.EPROTONOSUPPORT) {
			t.Skipf("the kernel has no nf_tables: %v", err)
		}
		if err != nil {
			t.Fatal(err)
		}
		conn, err := nftables.New()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			set, err := conn.GetSetByName(tableOf("test"), f.name)
			if err != nil {
				t.Fatal(err)
			}
			if elements, err := conn.GetSetElements(set); err != nil || len(elements) != n/2 {
				t.Errorf("the set of %s has %d elements of %d (%v)", f.name, len(elements), n/2, err)
			}
		}
	}
	if err := Unlock("test"); err != nil {
		t.Fatal(err)
	}
}

func addrPort(a net.Addr) netip.AddrPort { return a.(*net.TCPAddr).AddrPort() }

func connect(t *testing.T, l net.Listener) (here, there net.Conn) {
	t.Helper()
	here, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { here.Close() })
	if there, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { there.Close() })
	return here, there
}

// arrives reports whether a byte comes through within a time that is long for
// loopback.
func arrives(t *testing.T, from, to net.Conn) bool {
	t.Helper()
	if _, err := from.Write([]byte{1}); err != nil {
		t.Fatal(err)
	}
	_ = to.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
	n, err := to.Read(make([]byte, 16))
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal(err)
	}
	return n > 0
}

func closed(c net.Conn) bool {
	_ = c.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
	_, err := c.Read(make([]byte, 16))
	return !errors.Is(err, os.ErrDeadlineExceeded)
}
