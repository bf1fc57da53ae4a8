// SPDX-License-Identifier: Apache-2.0

package inspect

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/testproc"
)

func TestConnectionsAreThoseThatAProcessHas(t *testing.T) {
	s := sockets{owners: map[uint32]owner{
		11: {&Process{PID: 1}, 3}, 12: {&Process{PID: 1}, 4}, 13: {&Process{PID: 2}, 5}, 14: {&Process{PID: 2}, 6}, 15: {&Process{PID: 2}, 7},
	}}
	ip := net.ParseIP
	s.addTCP([]*netlink.Socket{
		{State: netlink.TCP_LISTEN, INode: 11, ID: netlink.SocketID{Source: ip("0.0.0.0"), SourcePort: 8080}},
		{State: netlink.TCP_ESTABLISHED, INode: 12, ID: netlink.SocketID{Source: ip("10.0.0.2"), SourcePort: 8080, Destination: ip("10.0.0.1"), DestinationPort: 50000}},
		{State: netlink.TCP_ESTABLISHED, INode: 99, ID: netlink.SocketID{Source: ip("10.0.0.2"), SourcePort: 8080, Destination: ip("10.0.0.1"), DestinationPort: 50001}},
		{State: netlink.TCP_TIME_WAIT, ID: netlink.SocketID{Source: ip("10.0.0.2"), SourcePort: 8080, Destination: ip("10.0.0.1"), DestinationPort: 50002}},
		{State: netlink.TCP_CLOSE_WAIT, INode: 13, ID: netlink.SocketID{Source: ip("::ffff:10.0.0.2"), SourcePort: 8080, Destination: ip("::ffff:10.0.0.1"), DestinationPort: 50003}},
		{State: netlink.TCP_SYN_SENT, INode: 14, ID: netlink.SocketID{Source: ip("2001:db8::1"), SourcePort: 80, Destination: ip("2001:db8::2"), DestinationPort: 81}},
		{State: netlink.TCP_TIME_WAIT + 1, INode: 15}, // TCP_CLOSE
	})
	want := []Connection{
		{PID: 1, FD: 4, Local: netip.MustParseAddrPort("10.0.0.2:8080"), Remote: netip.MustParseAddrPort("10.0.0.1:50000")},
		{PID: 2, FD: 5, Local: netip.MustParseAddrPort("10.0.0.2:8080"), Remote: netip.MustParseAddrPort("10.0.0.1:50003"), Ended: true},
		{PID: 2, FD: 6, Local: netip.MustParseAddrPort("[2001:db8::1]:80"), Remote: netip.MustParseAddrPort("[2001:db8::2]:81")},
	}
	if diff := cmp.Diff(want, s.connections, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
		t.Error(diff)
	}
}

func TestConnectionsInside(t *testing.T) {
	const (
		closeWait  = uint8(netlink.TCP_CLOSE_WAIT)
		finWait1   = uint8(netlink.TCP_FIN_WAIT1)
		finWait2   = uint8(netlink.TCP_FIN_WAIT2)
		timeWait   = uint8(netlink.TCP_TIME_WAIT)
		open       = uint8(netlink.TCP_ESTABLISHED)
		synRecv    = uint8(netlink.TCP_SYN_RECV)
		ours       = 11
		ourOther   = 12
		somebodys  = 99
		nobodys    = 0
		noSocket   = uint8(0)
		ourService = 8080
		service    = 9090 // another container's
	)
	for name, tc := range map[string]struct {
		state uint8
		// The other end.
		other  uint8
		inode  uint32
		remote string
		port   uint16
		inside bool
	}{
		"both ends are ours":                     {open, open, ourOther, "127.0.0.1", ourService, true},
		"by our own address":                     {open, open, ourOther, "10.0.0.2", ourService, true},
		"the other end is mapped to IPv6":        {open, open, ourOther, "::ffff:127.0.0.1", ourService, true},
		"another container's":                    {open, open, somebodys, "127.0.0.1", service, false},
		"on another machine":                     {open, noSocket, 0, "10.0.0.1", service, false},
		"to be accepted by us":                   {open, open, nobodys, "127.0.0.1", ourService, true},
		"in our backlog":                         {open, synRecv, nobodys, "127.0.0.1", ourService, true},
		"to be accepted by another container":    {open, open, nobodys, "127.0.0.1", service, false},
		"closed by its process":                  {closeWait, finWait2, nobodys, "127.0.0.1", service, true},
		"closed by its process a while ago":      {closeWait, noSocket, 0, "127.0.0.1", service, true},
		"closed by its process and by us":        {finWait2, timeWait, nobodys, "10.0.0.2", service, true},
		"closed by its process, data on its way": {open, finWait1, nobodys, "127.0.0.1", service, false},
	} {
		t.Run(name, func(t *testing.T) {
			s := sockets{owners: map[uint32]owner{ours: {&Process{PID: 1}, 3}, ourOther: {&Process{PID: 2}, 3}, 13: {&Process{PID: 2}, 4}}}
			here, there := net.ParseIP("10.0.0.2"), net.ParseIP(tc.remote)
			all := []*netlink.Socket{
				{State: uint8(netlink.TCP_LISTEN), INode: 13, ID: netlink.SocketID{Source: net.IPv6zero, SourcePort: ourService}},
				{State: uint8(netlink.TCP_LISTEN), INode: 98, ID: netlink.SocketID{Source: net.IPv6zero, SourcePort: service}},
				{State: tc.state, INode: ours, ID: netlink.SocketID{Source: here, SourcePort: 50000, Destination: there, DestinationPort: tc.port}},
			}
			if tc.other != noSocket {
				id := netlink.SocketID{Source: there, SourcePort: tc.port, Destination: here, DestinationPort: 50000}
				all = append(all, &netlink.Socket{State: tc.other, INode: tc.inode, ID: id})
			}
			s.addTCP(all)
			i := slices.IndexFunc(s.connections, func(c Connection) bool { return c.PID == 1 })
			if i < 0 || s.connections[i].Inside != tc.inside || s.connections[i].Here != (tc.other != noSocket) {
				t.Errorf("got %+v", s.connections)
			}
			if n := len(Outside(s.connections[i : i+1])); n != map[bool]int{true: 0, false: 1}[tc.inside] {
				t.Errorf("%d connections leave the container", n)
			}
		})
	}
}

// A connection that a peer outside has closed, and to which nothing is left to
// read or to send, is as good as closed: a probe leaves one.
func TestEndedConnections(t *testing.T) {
	for name, tc := range map[string]struct {
		state                uint8
		unread, unsent, peer uint32
		ended                bool
	}{
		"closed by its peer":          {netlink.TCP_CLOSE_WAIT, 1, 0, 0, true},
		"closed, and that is read":    {netlink.TCP_CLOSE_WAIT, 0, 0, 0, true},
		"with data that is not read":  {netlink.TCP_CLOSE_WAIT, 2, 0, 0, false},
		"with data that is not sent":  {netlink.TCP_CLOSE_WAIT, 1, 1, 0, false},
		"open":                        {netlink.TCP_ESTABLISHED, 0, 0, 0, false},
		"closed by another container": {netlink.TCP_CLOSE_WAIT, 1, 0, 99, true},
		"closed by our own":           {netlink.TCP_CLOSE_WAIT, 1, 0, 12, false},
	} {
		t.Run(name, func(t *testing.T) {
			s := sockets{owners: map[uint32]owner{11: {&Process{PID: 1}, 3}, 12: {&Process{PID: 2}, 3}}}
			here, there := net.ParseIP("10.0.0.2"), net.ParseIP("10.0.0.1")
			all := []*netlink.Socket{{State: tc.state, INode: 11, RQueue: tc.unread, WQueue: tc.unsent, ID: netlink.SocketID{Source: here, SourcePort: 80, Destination: there, DestinationPort: 5000}}}
			if tc.peer != 0 {
				all = append(all, &netlink.Socket{State: netlink.TCP_FIN_WAIT2, INode: tc.peer, ID: netlink.SocketID{Source: there, SourcePort: 5000, Destination: here, DestinationPort: 80}})
			}
			s.addTCP(all)
			i := slices.IndexFunc(s.connections, func(c Connection) bool { return c.PID == 1 })
			if i < 0 || s.connections[i].Ended != tc.ended {
				t.Fatalf("got %+v", s.connections)
			}
			c := Container{Root: &Process{PID: 1, PIDs: []int{1}}, Connections: s.connections[i : i+1]}
			c.Processes = []*Process{c.Root}
			findings := c.connected(&api.CheckpointOptions{})
			if refused := Refusal(findings) != nil; refused == (tc.ended || s.connections[i].Inside) {
				t.Errorf("found %v", findings)
			}
		})
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
				if !have.Inside {
					t.Errorf("the other end waits in the backlog of the same process, and %+v", have)
				}
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

const connectMode = "connect"

// TestMain makes this program one that has a TCP and a unix connection to
// itself, or what [holds] has, where a test starts it as such.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == connectMode {
		if err := connectToItself(); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if len(os.Args) == 3 && os.Args[1] == holdMode {
		if err := hold(os.Args[2]); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func connectToItself() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	for network, address := range map[string]string{"tcp6": "[::1]:4711", "unix": "@inspect"} {
		l, err := net.Listen(network, address)
		if err != nil {
			return err
		}
		defer l.Close()
		c, err := net.Dial(network, address)
		if err != nil {
			return err
		}
		defer c.Close()
		there, err := l.Accept()
		if err != nil {
			return err
		}
		defer there.Close()
	}
	fmt.Println("ready")
	_, err = bufio.NewReader(os.Stdin).ReadString('\n')
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// Sockets are looked up in the network namespace of the process that has them.
func TestSocketsOfAnotherNetworkNamespace(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root may create a network namespace")
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, connectMode)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	if line, err := testproc.Start(t, cmd).ReadString('\n'); err != nil || line != "ready\n" {
		t.Fatalf("it prints %q (%v)", line, err)
	}
	s, err := readSockets(processes(t, cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	ends := make(map[string]bool)
	for _, c := range s.connections {
		ends[c.Local.String()] = c.PID == cmd.Process.Pid
	}
	if len(ends) != 2 || !ends["[::1]:4711"] {
		t.Errorf("TCP connections: %v", s.connections)
	}
	pairs := 0
	for inode, u := range s.unix {
		if s.owners[inode].process != nil && s.owners[u.peer].process != nil {
			pairs++
		}
	}
	if pairs != 2 {
		t.Errorf("%d ends of unix sockets among %v", pairs, s.unix)
	}
}

// processes are read as a look at a container does.
func processes(t *testing.T, pids ...int) []*Process {
	t.Helper()
	out, err := Processes(t.Context(), pids)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// look looks at the files of processes, of which the first is the root.
func look(t *testing.T, pids ...int) *Container {
	t.Helper()
	c, err := LookAtFiles(t.Context(), pids[0], pids, nil)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestSocketInode(t *testing.T) {
	for link, want := range map[string]uint32{"socket:[17]": 17, "socket:[0]": 0, "pipe:[17]": 0, "socket:[x]": 0, "socket:[4294967296]": 0} {
		got, ok := socketInode(link)
		if ok != (want != 0) || ok && got != want {
			t.Errorf("%s: %d, %t", link, got, ok)
		}
	}
}
