package inspect

import (
	"net"
	"net/netip"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
)

func TestConnectionsAreThoseThatAProcessHas(t *testing.T) {
	s := sockets{owners: map[uint32]owner{
		11: {&Process{PID: 1}, 3}, 12: {&Process{PID: 1}, 4}, 13: {&Process{PID: 2}, 5}, 14: {&Process{PID: 2}, 6}, 15: {&Process{PID: 2}, 7},
	}}
	ip := net.ParseIP
	for _, d := range []netlink.Socket{
		{State: netlink.TCP_LISTEN, INode: 11, ID: netlink.SocketID{Source: ip("0.0.0.0"), SourcePort: 8080}},
		{State: netlink.TCP_ESTABLISHED, INode: 12, ID: netlink.SocketID{Source: ip("10.0.0.2"), SourcePort: 8080, Destination: ip("10.0.0.1"), DestinationPort: 50000}},
		{State: netlink.TCP_ESTABLISHED, INode: 99, ID: netlink.SocketID{Source: ip("10.0.0.2"), SourcePort: 8080, Destination: ip("10.0.0.1"), DestinationPort: 50001}},
		{State: netlink.TCP_TIME_WAIT, ID: netlink.SocketID{Source: ip("10.0.0.2"), SourcePort: 8080, Destination: ip("10.0.0.1"), DestinationPort: 50002}},
		{State: netlink.TCP_CLOSE_WAIT, INode: 13, ID: netlink.SocketID{Source: ip("::ffff:10.0.0.2"), SourcePort: 8080, Destination: ip("::ffff:10.0.0.1"), DestinationPort: 50003}},
		{State: netlink.TCP_SYN_SENT, INode: 14, ID: netlink.SocketID{Source: ip("2001:db8::1"), SourcePort: 80, Destination: ip("2001:db8::2"), DestinationPort: 81}},
		{State: netlink.TCP_TIME_WAIT + 1, INode: 15}, // TCP_CLOSE
	} {
		s.addTCP(&d)
	}
	want := []Connection{
		{1, 4, netip.MustParseAddrPort("10.0.0.2:8080"), netip.MustParseAddrPort("10.0.0.1:50000")},
		{2, 5, netip.MustParseAddrPort("10.0.0.2:8080"), netip.MustParseAddrPort("10.0.0.1:50003")},
		{2, 6, netip.MustParseAddrPort("[2001:db8::1]:80"), netip.MustParseAddrPort("[2001:db8::2]:81")},
	}
	if diff := cmp.Diff(want, s.connections, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
		t.Error(diff)
	}
}

func TestConnections(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	found := func(c net.Conn) bool {
		list, err := Connections(processes(t, os.Getpid()))
		if err != nil {
			t.Fatal(err)
		}
		for _, have := range list {
			if have.Local.String() == c.LocalAddr().String() && have.Remote.String() == c.RemoteAddr().String() {
				return true
			}
			if have.Local.String() == l.Addr().String() && !have.Remote.IsValid() {
				t.Errorf("a listening socket is %v", have)
			}
		}
		return false
	}
	c, err := net.Dial("tcp4", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if !found(c) {
		t.Error("an open connection is not found")
	}
	c.Close()
	if found(c) {
		t.Error("a closed connection is found")
	}
}

// processes are read as a look at a container does.
func processes(t *testing.T, pids ...int) []*Process {
	t.Helper()
	out, err := Processes(pids)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestSocketInode(t *testing.T) {
	for link, want := range map[string]uint32{"socket:[17]": 17, "socket:[0]": 0, "pipe:[17]": 0, "socket:[x]": 0, "socket:[4294967296]": 0} {
		got, ok := socketInode(link)
		if ok != (want != 0) || ok && got != want {
			t.Errorf("%s: %d, %t", link, got, ok)
		}
	}
}
