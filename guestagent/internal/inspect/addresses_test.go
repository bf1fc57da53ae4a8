// SPDX-License-Identifier: Apache-2.0

package inspect

import (
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/thread"
)

// inGuest calls f in a network namespace whose interface eth0 has addresses, and
// whose interface down is not up.
func inGuest(t *testing.T, f func() error) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("makes a network namespace: only as root")
	}
	err := thread.Do(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "down"}); err != nil {
			return err
		}
		for name, list := range map[string][]string{"lo": nil, "eth0": {"10.0.0.2/24", "2001:db8::2/64"}, "down": {"10.0.1.2/24", "2001:db8:1::2/64"}} {
			link, err := netlink.LinkByName(name)
			if err != nil {
				return err
			}
			for _, a := range list {
				addr, err := netlink.ParseAddr(a)
				if err != nil {
					return err
				}
				addr.Flags = unix.IFA_F_NODAD // else it is not usable at once
				if err := netlink.AddrAdd(link, addr); err != nil {
					return err
				}
			}
			if name == "down" {
				continue
			}
			if err := netlink.LinkSetUp(link); err != nil {
				return err
			}
		}
		return f()
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestAddresses(t *testing.T) {
	inGuest(t, func() error {
		got, err := Addresses()
		want := []Address{{"eth0", netip.MustParseAddr("10.0.0.2"), true}, {"eth0", netip.MustParseAddr("2001:db8::2"), true}}
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("got %v, %v, want %v", got, err, want)
		}
		return nil
	})
}

// A socket whose address a restored container does not have is refused: the restore
// would fail. It is accepted where the user says that the address will exist.
func TestSocketsOnAnAddressThatIsLost(t *testing.T) {
	bind := func(addr string, options ...int) func() (int, error) {
		return func() (int, error) {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return -1, err
			}
			for _, o := range options {
				if err := unix.SetsockoptInt(fd, unix.SOL_IP, o, 1); err != nil {
					return -1, err
				}
			}
			return fd, unix.Bind(fd, &unix.SockaddrInet4{Addr: netip.MustParseAddr(addr).As4(), Port: 53})
		}
	}
	six := func(addr string, options ...int) func() (int, error) {
		return func() (int, error) {
			fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return -1, err
			}
			for _, value := range options {
				if err := unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_FREEBIND, value); err != nil {
					return -1, err
				}
				if value != 0 {
					err = unix.Bind(fd, &unix.SockaddrInet6{Addr: netip.MustParseAddr(addr).As16(), Port: 53})
				}
				if err != nil {
					return -1, err
				}
			}
			return fd, nil
		}
	}
	for name, tc := range map[string]struct {
		socket func() (int, error)
		made   bool
		lost   string
	}{
		"IPv6, of no interface, switched off since": {six("2001:db8::ff00", 1, 0), false, ""},
		"IPv6, of an interface that was made":       {six("2001:db8::2", 1, 0), true, "[2001:db8::2]:53"},
		"IPv6, of an interface that is down":        {six("2001:db8:1::2", 1, 0), false, "[2001:db8:1::2]:53"},
		"of an interface that was made":             {bind("10.0.0.2"), true, "10.0.0.2:53"},
		"of a device":                               {bind("10.0.0.2"), false, ""},
		"of an interface that is down":              {bind("10.0.1.2"), false, "10.0.1.2:53"},
		"of the subnet":                             {bind("10.0.0.255"), false, "10.0.0.255:53"},
		"of no interface, on purpose":               {bind("10.9.9.9", unix.IP_FREEBIND), false, ""},
		"loopback":                                  {bind("127.0.0.9"), false, ""},
		"broadcast":                                 {bind("255.255.255.255"), false, ""},
		"multicast":                                 {bind("224.0.0.251"), false, ""},
	} {
		t.Run(name, func(t *testing.T) {
			inGuest(t, func() error {
				fd, err := tc.socket()
				if err != nil {
					return err
				}
				defer unix.Close(fd)
				self := &Process{PID: os.Getpid(), PIDs: []int{os.Getpid()}, Name: "test"}
				c := &Container{Root: self, Processes: []*Process{self}, sockets: sockets{owners: map[uint32]owner{1: {self, fd}}}}
				if c.Addresses, err = Addresses(); err != nil {
					return err
				}
				for i := range c.Addresses {
					c.Addresses[i].Made = tc.made
				}
				err = Refusal(c.unusualSockets(&api.CheckpointOptions{}))
				if refused := err != nil; refused != (tc.lost != "") || refused && !strings.Contains(err.Error(), tc.lost) {
					t.Errorf("refused: %v", err)
				}
				findings := c.unusualSockets(&api.CheckpointOptions{AddressStays: true})
				if Refusal(findings) != nil || tc.lost != "" && (len(findings) != 1 || !strings.Contains(findings[0].String(), tc.lost)) {
					t.Errorf("with an address that stays: %v", findings)
				}
				return nil
			})
		})
	}
}

// So is a TCP connection inside the container.
func TestConnectionsOnAnAddressThatIsLost(t *testing.T) {
	inGuest(t, func() error {
		self := &Process{PID: os.Getpid(), PIDs: []int{os.Getpid()}, Name: "test"}
		at := netip.MustParseAddrPort("10.0.1.2:80")
		c := &Container{
			Root: self, Processes: []*Process{self}, sockets: sockets{owners: map[uint32]owner{1: {self, 0}}},
			Connections: []Connection{{PID: self.PID, Local: at, Remote: at, Inside: true}},
		}
		if err := Refusal(c.unusualSockets(&api.CheckpointOptions{})); err == nil || !strings.Contains(err.Error(), at.String()) {
			t.Errorf("refused: %v", err)
		}
		if err := Refusal(c.unusualSockets(&api.CheckpointOptions{TcpClose: true})); err != nil {
			t.Errorf("closed after the restore, and refused: %v", err)
		}
		return nil
	})
}

func TestNewAddress(t *testing.T) {
	for from, want := range map[string]string{
		"10.0.0.2": "10.0.0.2", "::ffff:10.0.0.2": "10.0.0.2", "169.254.0.2": "169.254.0.2", "2001:db8::2": "2001:db8::2", "fe80::2": "fe80::2%eth0",
	} {
		if got := NewAddress("eth0", netip.MustParseAddr(from)); got.Addr.String() != want {
			t.Errorf("%s becomes %s, not %s", from, got.Addr, want)
		}
	}
}

func TestSocketsOnTheOwnAddress(t *testing.T) {
	four := func(addr string, port int) unix.Sockaddr {
		return &unix.SockaddrInet4{Addr: netip.MustParseAddr(addr).As4(), Port: port}
	}
	six := func(addr string, port int) unix.Sockaddr {
		return &unix.SockaddrInet6{Addr: netip.MustParseAddr(addr).As16(), Port: port}
	}
	const stream, datagram = unix.SOCK_STREAM, unix.SOCK_DGRAM
	for name, tc := range map[string]struct {
		domain, kind int
		bind, peer   unix.Sockaddr
		want         string
	}{
		"a TCP listener": {unix.AF_INET, stream, four("10.0.0.2", 80), nil, "10.0.0.2:80"},
		"a UDP server":   {unix.AF_INET, datagram, four("10.0.0.2", 53), nil, "10.0.0.2:53"},
		"a UDP client":   {unix.AF_INET, datagram, nil, four("10.0.0.1", 53), "10.0.0.2:"},
		"raw":            {unix.AF_INET, unix.SOCK_RAW, four("10.0.0.2", 0), nil, "10.0.0.2:"},
		"over IPv6":      {unix.AF_INET6, stream, six("2001:db8::2", 80), nil, "[2001:db8::2]:80"},
		"IPv4 over IPv6": {unix.AF_INET6, stream, six("::ffff:10.0.0.2", 80), nil, "10.0.0.2:80"},
		"any address":    {unix.AF_INET, stream, four("0.0.0.0", 80), nil, ""},
		"any, over IPv6": {unix.AF_INET6, stream, six("::", 80), nil, ""},
		"the loopback":   {unix.AF_INET, datagram, four("127.0.0.1", 53), nil, ""},
		"not bound":      {unix.AF_INET, stream, nil, nil, ""},
	} {
		t.Run(name, func(t *testing.T) {
			inGuest(t, func() error {
				fd, err := unix.Socket(tc.domain, tc.kind|unix.SOCK_CLOEXEC, unix.IPPROTO_IP)
				if tc.kind == unix.SOCK_RAW {
					fd, err = unix.Socket(tc.domain, tc.kind|unix.SOCK_CLOEXEC, unix.IPPROTO_UDP)
				}
				if err != nil {
					return err
				}
				defer unix.Close(fd)
				if tc.bind != nil {
					if err := unix.Bind(fd, tc.bind); err != nil {
						return err
					}
				}
				if tc.peer != nil {
					if err := unix.Connect(fd, tc.peer); err != nil {
						return err
					}
				}
				self := &Process{PID: os.Getpid(), PIDs: []int{os.Getpid()}, Name: "test"}
				c := &Container{Root: self, Processes: []*Process{self}, sockets: sockets{owners: map[uint32]owner{1: {self, fd}}}}
				if c.Addresses, err = Addresses(); err != nil {
					return err
				}
				c.Addresses[0].Made = false // as a hypervisor's device
				c.Addresses[1].Made = false
				findings := c.unusualSockets(&api.CheckpointOptions{})
				if tc.want == "" && len(findings) > 0 {
					t.Errorf("got %v", findings)
				}
				if tc.want != "" && (len(findings) != 1 || findings[0].Class != Warning || !strings.Contains(findings[0].String(), "own address, "+tc.want)) {
					t.Errorf("got %v, want a warning with %s", findings, tc.want)
				}
				return nil
			})
		})
	}
}

// A TCP connection has a rule of its own.
func TestConnectionFromTheOwnAddressIsNoBoundSocket(t *testing.T) {
	inGuest(t, func() error {
		var fds [2]int
		for i := range fds {
			var err error
			if fds[i], err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
				return err
			}
			defer unix.Close(fds[i])
		}
		at := &unix.SockaddrInet4{Addr: [4]byte{10, 0, 0, 2}, Port: 80}
		if err := unix.Bind(fds[0], at); err != nil {
			return err
		}
		if err := unix.Listen(fds[0], 1); err != nil {
			return err
		}
		if err := unix.Connect(fds[1], at); err != nil {
			return err
		}
		self := &Process{PID: os.Getpid(), PIDs: []int{os.Getpid()}, Name: "test"}
		c := &Container{Root: self, Processes: []*Process{self}, sockets: sockets{owners: map[uint32]owner{1: {self, fds[0]}, 2: {self, fds[1]}}}}
		var err error
		if c.Addresses, err = Addresses(); err != nil {
			return err
		}
		c.Addresses[0].Made = false // as a hypervisor's device
		if got := c.unusualSockets(&api.CheckpointOptions{}); len(got) != 1 || strings.Contains(got[0].String(), "more") {
			t.Errorf("got %v", got)
		}
		return nil
	})
}

// A restore binds a socket to the interface of the same name or index.
func TestSocketsOnAnInterfaceThatIsLost(t *testing.T) {
	device := func(name string) func(fd, index int) error {
		return func(fd, _ int) error { return unix.BindToDevice(fd, name) }
	}
	free := func(_, _ int) error { return nil }
	for name, tc := range map[string]struct {
		domain, kind int
		bind         func(fd, index int) error
		refused      bool
	}{
		"UDP":                 {unix.AF_INET, unix.SOCK_DGRAM, free, false},
		"UDP on lo":           {unix.AF_INET, unix.SOCK_DGRAM, device("lo"), false},
		"UDP on it":           {unix.AF_INET, unix.SOCK_DGRAM, device("down"), true},
		"TCP over IPv6 on it": {unix.AF_INET6, unix.SOCK_STREAM, device("down"), true},
		"packets":             {unix.AF_PACKET, unix.SOCK_RAW, free, false},
		"packets on lo":       {unix.AF_PACKET, unix.SOCK_RAW, func(fd, _ int) error { return unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: 1}) }, false},
		"packets on it":       {unix.AF_PACKET, unix.SOCK_RAW, func(fd, index int) error { return unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: index}) }, true},
	} {
		inGuest(t, func() error {
			link, err := netlink.LinkByName("down")
			if err != nil {
				return err
			}
			fd, err := unix.Socket(tc.domain, tc.kind|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			if err := tc.bind(fd, link.Attrs().Index); err != nil {
				return err
			}
			self := &Process{PID: os.Getpid(), PIDs: []int{os.Getpid()}, Name: "test"}
			c := &Container{Root: self, Processes: []*Process{self}, sockets: sockets{owners: map[uint32]owner{1: {self, fd}}}}
			if c.Addresses, c.made, err = interfaces(); err != nil {
				return err
			}
			err = Refusal(c.unusualSockets(nil))
			if tc.refused != (err != nil) || err != nil && !strings.Contains(err.Error(), "bound to the network interface down, which a restored container does not have") {
				t.Errorf("%s: %v", name, err)
			}
			if err := Refusal(c.unusualSockets(&api.CheckpointOptions{AddressStays: true})); err != nil {
				t.Errorf("%s, which stays: %v", name, err)
			}
			return nil
		})
	}
}
