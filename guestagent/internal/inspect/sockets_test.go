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
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/testproc"
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

const connectMode = "connect"

// TestMain makes this program one that has a TCP and a unix connection to
// itself, where a test starts it as such.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == connectMode {
		if err := connectToItself(); err != nil {
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
	for inode, peer := range s.peers {
		if s.owners[inode].process != nil && s.owners[peer].process != nil {
			pairs++
		}
	}
	if pairs != 2 {
		t.Errorf("%d ends of unix sockets among %v", pairs, s.peers)
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
