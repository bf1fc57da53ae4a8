// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/netlock"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
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

// Neither end of a connection inside the container may send while the other one
// is not restored: what it says would be answered with a reset.
func TestARestoreLocksConnectionsInside(t *testing.T) {
	a := &Agent{dir: t.TempDir()}
	if err := os.Mkdir(a.dir+"/containers", 0o700); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		listen, network, dial string
		// mapped is how the address of the accepting end is written in an image.
		mapped string
	}{
		"IPv4":        {"127.0.0.1:0", "tcp4", "127.0.0.1", ""},
		"IPv6":        {"[::1]:0", "tcp6", "::1", ""},
		"mapped IPv4": {"[::]:0", "tcp4", "127.0.0.1", "::ffff:127.0.0.1"},
	} {
		t.Run(name, func(t *testing.T) {
			inNetworkNamespace(t)
			l, err := net.Listen("tcp", tc.listen)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			port := uint16(l.Addr().(*net.TCPAddr).Port)
			connect := func() (here, there net.Conn) {
				t.Helper()
				if here, err = net.Dial(tc.network, net.JoinHostPort(tc.dial, strconv.Itoa(int(port)))); err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { here.Close() })
				if there, err = l.Accept(); err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { there.Close() })
				return here, there
			}
			here, there := connect()
			other, otherThere := connect() // in no image

			dir := t.TempDir()
			addr := netip.MustParseAddr(tc.dial)
			server := addr
			if tc.mapped != "" {
				server = netip.MustParseAddr(tc.mapped)
			}
			from := here.LocalAddr().(*net.TCPAddr).AddrPort().Port()
			end := func(addr netip.Addr, local, remote uint16) socket {
				return socket{unix.SOCK_STREAM, unix.IPPROTO_TCP, netip.AddrPortFrom(addr, local).String(), netip.AddrPortFrom(addr, remote).String(), ""}
			}
			listener := end(server, port, 0)
			writeFiles(t, dir, listener.entry(1), end(addr, from, port).entry(2), end(server, port, from).entry(3))

			c := &container{ID: "c1"}
			for _, o := range []*api.CheckpointOptions{{TcpClose: true}, nil} {
				locked, err := a.lockRestored(c, &api.RestoreRequest{Options: o}, dir)
				if errors.Is(err, unix.EPROTONOSUPPORT) {
					t.Skipf("the kernel has no nf_tables: %v", err)
				}
				if err != nil {
					t.Fatal(err)
				}
				if locked == o.GetTcpClose() || c.NetworkLocked != locked {
					t.Errorf("locked: %t, noted: %t, with %v", locked, c.NetworkLocked, o)
				}
			}
			for _, ends := range [][2]net.Conn{{here, there}, {there, here}} {
				if arrives(t, ends[0], ends[1]) {
					t.Errorf("what %s sends arrives during the restore", ends[0].LocalAddr())
				}
			}
			if !arrives(t, other, otherThere) {
				t.Error("a connection that is not restored is locked as well")
			}
			if err := a.unlockNetwork(t.Context(), c); err != nil {
				t.Fatal(err)
			}
			for _, ends := range [][2]net.Conn{{here, there}, {there, here}} {
				if !arrives(t, ends[0], ends[1]) {
					t.Errorf("nothing that %s sends arrives after the restore", ends[0].LocalAddr())
				}
			}
		})
	}
}

// What was sent in spite of a lock arrives late.
func arrives(t *testing.T, from, to net.Conn) bool {
	t.Helper()
	if _, err := from.Write([]byte{1}); err != nil {
		t.Fatal(err)
	}
	_ = to.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
	n, err := io.ReadAtLeast(to, make([]byte, 16), 1)
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal(err)
	}
	return n > 0
}

// A restore reads the addresses that sockets have once they are moved, and locks
// nothing but TCP connections, each once.
func TestRestoredConnections(t *testing.T) {
	dir := t.TempDir()
	for i := range 2 {
		list, _, err := restoredConnections(dir)
		if err != nil || len(list) != 0 {
			t.Fatalf("%d: %v, %v", i, list, err)
		}
		if i == 0 {
			writeFiles(t, dir, socket{unix.SOCK_DGRAM, unix.IPPROTO_UDP, "10.0.0.2:4000", "10.0.0.1:53", ""}.entry(1), socket{unix.SOCK_STREAM, unix.IPPROTO_TCP, "[::]:80", "[::]:0", ""}.entry(2))
		}
	}
	if err := os.Remove(dir + "/" + filesImage); err != nil {
		t.Fatal(err)
	}
	tcp := func(local, remote string) socket {
		return socket{unix.SOCK_STREAM, unix.IPPROTO_TCP, local, remote, ""}
	}
	writeFiles(t, dir, tcp("10.0.0.2:80", "10.0.0.2:4000").entry(1), tcp("[::ffff:10.0.0.2]:4000", "[::ffff:10.0.0.2]:80").entry(2), tcp("10.0.0.2:80", "10.0.0.2:4000").entry(3))
	moves := &readdressing{moved: movedAddresses(interfaces("eth0=10.0.0.2"), interfaces("eth0=10.0.0.3"))}
	if _, err := moves.apply(dir); err != nil {
		t.Fatal(err)
	}
	list, keepAlive, err := restoredConnections(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(keepAlive) != 0 {
		t.Errorf("keepalive have %v", keepAlive)
	}
	connection := func(local, remote string) inspect.Connection {
		return inspect.Connection{Local: netip.MustParseAddrPort(local), Remote: netip.MustParseAddrPort(remote)}
	}
	want := []inspect.Connection{connection("10.0.0.3:80", "10.0.0.3:4000"), connection("10.0.0.3:4000", "10.0.0.3:80")}
	if len(list) != 2 || list[0] != want[0] || list[1] != want[1] {
		t.Errorf("%v, not %v", list, want)
	}
}

// During a restore no keepalive probe is answered: CRIU gets sockets without it,
// and they have it again once it is done. An image set that was made while it was
// disabled has it.
func TestKeepaliveIsDisabledInARestore(t *testing.T) {
	inNetworkNamespace(t)
	a := &Agent{dir: t.TempDir()}
	if err := os.Mkdir(a.dir+"/containers", 0o700); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	tcp := func(id uint32, local, remote string, on bool) *fdinfo.FileEntry {
		e := socket{unix.SOCK_STREAM, unix.IPPROTO_TCP, local, remote, ""}.entry(id)
		e.Isk.Opts.SoKeepalive = proto.Bool(on)
		return e
	}
	writeFiles(t, dir, tcp(1, "10.0.0.2:80", "10.0.0.9:4000", true), tcp(2, "10.0.0.2:80", "10.0.0.9:4001", false), tcp(3, "10.0.0.2:80", "0.0.0.0:0", true))
	check := func(when string, want ...bool) {
		t.Helper()
		for i, e := range readFiles(t, dir) {
			if have := e.GetIsk().GetOpts().GetSoKeepalive(); have != want[i] {
				t.Errorf("%s socket %d has keepalive: %t", when, i, have)
			}
		}
	}
	c := &container{ID: "c1"}
	locked, err := a.lockRestored(c, &api.RestoreRequest{}, dir)
	if errors.Is(err, unix.EPROTONOSUPPORT) {
		t.Skipf("the kernel has no nf_tables: %v", err)
	}
	if err != nil || !locked {
		t.Fatalf("locked: %t, %v", locked, err)
	}
	check("during a restore", false, false, true)
	want := []netlock.Endpoints{{Local: netip.MustParseAddrPort("10.0.0.2:80"), Remote: netip.MustParseAddrPort("10.0.0.9:4000")}}
	if again, err := a.load("c1"); err != nil || !slices.Equal(again.KeepAlive, want) {
		t.Errorf("the record has %v (%v), not %v", again.KeepAlive, err, want)
	}
	if err := mendImages(dir, inspect.Names{}, nil, c.KeepAlive, notInImages); err != nil {
		t.Fatal(err)
	}
	check("after a dump", true, false, true)
	empty := t.TempDir()
	if err := os.WriteFile(empty+"/cgroup.procs", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := a.unlockRestored(t.Context(), c, empty); err != nil {
		t.Fatal(err)
	}
	if again, err := a.load("c1"); err != nil || again.NetworkLocked || len(again.KeepAlive) != 0 {
		t.Errorf("after the restore the record is %+v (%v)", again, err)
	}
}
