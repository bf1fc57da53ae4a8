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
		for name, list := range map[string][]string{"lo": nil, "eth0": {"10.0.0.2/24", "2001:db8::2/64"}, "down": {"10.0.1.2/24"}} {
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
		want := []Address{{"eth0", netip.MustParseAddr("10.0.0.2")}, {"eth0", netip.MustParseAddr("2001:db8::2")}}
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("got %v, %v, want %v", got, err, want)
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
		"a TCP listener":    {unix.AF_INET, stream, four("10.0.0.2", 80), nil, "10.0.0.2:80"},
		"a UDP server":      {unix.AF_INET, datagram, four("10.0.0.2", 53), nil, "10.0.0.2:53"},
		"a UDP client":      {unix.AF_INET, datagram, nil, four("10.0.0.1", 53), "10.0.0.2:"},
		"raw":               {unix.AF_INET, unix.SOCK_RAW, four("10.0.0.2", 0), nil, "10.0.0.2:"},
		"over IPv6":         {unix.AF_INET6, stream, six("2001:db8::2", 80), nil, "[2001:db8::2]:80"},
		"IPv4 over IPv6":    {unix.AF_INET6, stream, six("::ffff:10.0.0.2", 80), nil, "10.0.0.2:80"},
		"any address":       {unix.AF_INET, stream, four("0.0.0.0", 80), nil, ""},
		"any, over IPv6":    {unix.AF_INET6, stream, six("::", 80), nil, ""},
		"the loopback":      {unix.AF_INET, datagram, four("127.0.0.1", 53), nil, ""},
		"not bound":         {unix.AF_INET, stream, nil, nil, ""},
		"another interface": {unix.AF_INET, stream, four("10.0.1.2", 80), nil, ""},
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
				findings := c.unusualSockets()
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
		if got := c.unusualSockets(); len(got) != 1 || strings.Contains(got[0].String(), "more") {
			t.Errorf("got %v", got)
		}
		return nil
	})
}
