// SPDX-License-Identifier: Apache-2.0

package netgate

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/thread"
)

// node is a network namespace with a path, that of a node, of a sandbox or of a
// guest.
type node struct {
	t    *testing.T
	path string
}

func newNode(t *testing.T) *node {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("makes network namespaces: only as root")
	}
	n := &node{t: t, path: filepath.Join(t.TempDir(), "ns")}
	if err := os.WriteFile(n.path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	err := thread.Do(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		return unix.Mount("/proc/thread-self/ns/net", n.path, "", unix.MS_BIND, "")
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.remove)
	n.with(func(h *netlink.Handle) error {
		lo, err := h.LinkByName("lo")
		if err != nil {
			return err
		}
		return h.LinkSetUp(lo)
	})
	return n
}

func (n *node) remove() {
	if err := unix.Unmount(n.path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
		n.t.Error(err)
	}
}

func (n *node) with(do func(*netlink.Handle) error) {
	n.t.Helper()
	if err := inNamespace(n.path, do); err != nil {
		n.t.Fatal(err)
	}
}

// in runs f on a thread in the namespace, in which its sockets stay.
func (n *node) in(f func() error) error {
	return thread.Do(func() error {
		fd, err := unix.Open(n.path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
			return err
		}
		return f()
	})
}

// connect makes a veth pair from n to other with the addresses, if any.
func (n *node) connect(name string, addresses []string, other *node, otherName string, otherAddresses []string) {
	n.t.Helper()
	f, err := os.Open(other.path)
	if err != nil {
		n.t.Fatal(err)
	}
	defer f.Close()
	n.with(func(h *netlink.Handle) error {
		return h.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: otherName, PeerNamespace: netlink.NsFd(f.Fd())})
	})
	n.up(name, addresses)
	other.up(otherName, otherAddresses)
}

func (n *node) up(name string, addresses []string) {
	n.t.Helper()
	n.with(func(h *netlink.Handle) error {
		link, err := h.LinkByName(name)
		if err != nil {
			return err
		}
		for _, text := range addresses {
			a, err := netlink.ParseAddr(text)
			if err != nil {
				return err
			}
			a.Flags = unix.IFA_F_NODAD // usable at once
			if err := h.AddrAdd(link, a); err != nil {
				return err
			}
		}
		return h.LinkSetUp(link)
	})
}

func (n *node) listen(address string) net.Listener {
	n.t.Helper()
	var l net.Listener
	err := n.in(func() (err error) {
		l, err = net.Listen("tcp", address)
		return err
	})
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { l.Close() })
	return l
}

// dial connects from a port that is known before.
func (n *node) dial(from, to netip.AddrPort, timeout time.Duration) (conn net.Conn, err error) {
	err = n.in(func() (err error) {
		d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(from), Timeout: timeout}
		conn, err = d.Dial("tcp", to.String())
		return err
	})
	return conn, err
}

// pair is a connection from peer to a listener of n.
func (n *node) pair(l net.Listener, peer *node) (here, there net.Conn) {
	n.t.Helper()
	there, err := peer.dial(netip.AddrPort{}, addrPort(l.Addr()), 5*time.Second)
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { there.Close() })
	if here, err = l.Accept(); err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { here.Close() })
	return here, there
}

func addrPort(a net.Addr) netip.AddrPort {
	if t, ok := a.(*net.TCPAddr); ok {
		return t.AddrPort()
	}
	return netip.AddrPort{}
}

func connectionOf(c net.Conn) Connection {
	return Connection{Local: addrPort(c.LocalAddr()), Remote: addrPort(c.RemoteAddr())}
}

// arrives reports whether a byte comes through: at once, or by a retransmission
// if eventually.
func arrives(t *testing.T, from, to net.Conn, eventually bool) bool {
	t.Helper()
	if _, err := from.Write([]byte{1}); err != nil {
		t.Fatal(err)
	}
	wait := 200 * time.Millisecond
	if eventually {
		wait = 20 * time.Second
	}
	_ = to.SetReadDeadline(time.Now().Add(wait))
	n, err := to.Read(make([]byte, 1))
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal(err)
	}
	return n > 0
}

func (n *node) close(connections ...Connection) {
	n.t.Helper()
	if err := Close(n.path, connections); err != nil {
		n.t.Fatal(err)
	}
}

// rootQdiscs are those that somebody has made.
func (n *node) rootQdiscs() (out []string) {
	n.t.Helper()
	n.with(func(h *netlink.Handle) error {
		list, err := h.QdiscList(nil)
		for _, q := range list {
			if q.Attrs().Handle != 0 && q.Attrs().Parent == netlink.HANDLE_ROOT {
				out = append(out, q.Type())
			}
		}
		return err
	})
	return out
}

var (
	sandboxAddresses = []string{"192.0.2.2/24", "2001:db8::2/64"}
	peerAddresses    = []string{"192.0.2.1/24", "2001:db8::1/64"}
)

func TestGateHoldsBackConnections(t *testing.T) {
	sandbox, peer := newNode(t), newNode(t)
	sandbox.connect("eth0", sandboxAddresses, peer, "veth", peerAddresses)
	for _, address := range []string{"192.0.2.2:0", "[2001:db8::2]:0"} {
		t.Run(address, func(t *testing.T) {
			l := sandbox.listen(address)
			kept, keptPeer := sandbox.pair(l, peer)
			again, againPeer := sandbox.pair(l, peer)
			other, otherPeer := sandbox.pair(l, peer)

			sandbox.close(connectionOf(kept), connectionOf(again))
			if arrives(t, kept, keptPeer, false) || arrives(t, again, againPeer, false) {
				t.Error("packets leave through the closed gate")
			}
			if !arrives(t, other, otherPeer, true) {
				t.Error("the gate drops another connection's packets, too")
			}
			sandbox.close(connectionOf(again), connectionOf(again))
			if !arrives(t, kept, keptPeer, true) {
				t.Error("the gate drops a connection's packets that is not named any more")
			}
			if arrives(t, again, againPeer, false) {
				t.Error("packets leave that the gate held back before and after")
			}
			if err := Open(sandbox.path); err != nil {
				t.Fatal(err)
			}
			if !arrives(t, again, againPeer, true) {
				t.Error("nothing leaves through the open gate")
			}
			if left := sandbox.rootQdiscs(); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
		})
	}
}

// A kernel that has an address and not the connection answers with a reset: the
// sandbox's own, and a guest's behind the interface, connected as Kata does it.
func TestGateHoldsBackResets(t *testing.T) {
	here, there := netip.MustParseAddrPort("192.0.2.2:8080"), netip.MustParseAddrPort("192.0.2.1:40000")
	refuses := func(peer *node) bool {
		t.Helper()
		c, err := peer.dial(there, here, 500*time.Millisecond)
		if err == nil {
			c.Close()
			t.Fatal("connected")
		}
		return errors.Is(err, syscall.ECONNREFUSED)
	}
	for _, tc := range []struct {
		name string
		kata bool
	}{{"the namespace's kernel", false}, {"the guest's kernel", true}} {
		t.Run(tc.name, func(t *testing.T) {
			sandbox, peer := newNode(t), newNode(t)
			sandbox.connect("eth0", []string{"192.0.2.2/24"}, peer, "veth", []string{"192.0.2.1/24"})
			sandbox.close(Connection{Local: here, Remote: there})
			if tc.kata {
				guest := newNode(t)
				// The guest's interface has the address and the hardware address of the sandbox's.
				guest.connect("eth0", []string{"192.0.2.2/24"}, sandbox, "tap0_kata", nil)
				sandbox.redirect(guest)
			}
			if refuses(peer) {
				t.Error("a reset leaves through the closed gate")
			}
			sandbox.close()
			if !refuses(peer) {
				t.Error("no reset leaves through the open gate: this test shows nothing")
			}
			// Where the gate comes last: while the VM is running, at its end.
			sandbox.close(Connection{Local: here, Remote: there})
			if refuses(peer) {
				t.Error("a reset leaves through the gate that was closed again")
			}
			if tc.kata {
				sandbox.unredirect()
				if refuses(peer) {
					t.Error("a reset leaves after the end of the VM")
				}
			}
		})
	}
}

// redirect is Kata's tcfilter.
func (n *node) redirect(guest *node) {
	n.t.Helper()
	n.with(func(h *netlink.Handle) error {
		eth0, err := h.LinkByName("eth0")
		if err != nil {
			return err
		}
		tap, err := h.LinkByName("tap0_kata")
		if err != nil {
			return err
		}
		for from, to := range map[netlink.Link]netlink.Link{eth0: tap, tap: eth0} {
			qdisc := &netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: from.Attrs().Index, Parent: netlink.HANDLE_INGRESS}}
			if err := h.QdiscAdd(qdisc); err != nil {
				return fmt.Errorf("Kata could not add its qdisc: %w", err)
			}
			err := h.FilterAdd(&netlink.U32{
				FilterAttrs: netlink.FilterAttrs{LinkIndex: from.Attrs().Index, Parent: netlink.MakeHandle(0xffff, 0), Protocol: unix.ETH_P_ALL},
				Actions: []netlink.Action{&netlink.MirredAction{
					ActionAttrs: netlink.ActionAttrs{Action: netlink.TC_ACT_STOLEN}, MirredAction: netlink.TCA_EGRESS_REDIR, Ifindex: to.Attrs().Index,
				}},
			})
			if err != nil {
				return err
			}
		}
		return inNamespace(guest.path, func(g *netlink.Handle) error {
			link, err := g.LinkByName("eth0")
			if err != nil {
				return err
			}
			return g.LinkSetHardwareAddr(link, eth0.Attrs().HardwareAddr)
		})
	})
}

func (n *node) unredirect() {
	n.t.Helper()
	n.with(func(h *netlink.Handle) error {
		eth0, err := h.LinkByName("eth0")
		if err != nil {
			return err
		}
		return h.QdiscDel(&netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: eth0.Attrs().Index, Parent: netlink.HANDLE_INGRESS}})
	})
}

// Kata's macvtap takes the addresses off the interface: then it is the one.
func TestGateWithoutAddresses(t *testing.T) {
	sandbox, peer := newNode(t), newNode(t)
	sandbox.connect("eth0", nil, peer, "veth", nil)
	sandbox.close(Connection{Local: netip.MustParseAddrPort("192.0.2.2:1"), Remote: netip.MustParseAddrPort("192.0.2.1:2")})
	if have := sandbox.rootQdiscs(); len(have) != 1 {
		t.Errorf("the gate is %v", have)
	}
}

func TestGateOfManyConnections(t *testing.T) {
	sandbox, peer := newNode(t), newNode(t)
	sandbox.connect("eth0", sandboxAddresses, peer, "veth", peerAddresses)
	l := sandbox.listen("192.0.2.2:0")
	kept, keptPeer := sandbox.pair(l, peer)
	list := []Connection{connectionOf(kept)}
	for i := range maxConnections {
		list = append(list, Connection{Local: list[0].Local, Remote: netip.AddrPortFrom(list[0].Remote.Addr(), uint16(1+i))})
	}
	begin := time.Now()
	sandbox.close(list[:maxConnections]...)
	t.Logf("%d connections took %s", maxConnections, time.Since(begin))
	if arrives(t, kept, keptPeer, false) {
		t.Error("packets leave through the closed gate")
	}
	sandbox.close(list...)
	if arrives(t, kept, keptPeer, false) {
		t.Error("packets leave through the gate of more connections than are told apart")
	}
	sandbox.close()
	if !arrives(t, kept, keptPeer, true) {
		t.Error("nothing leaves through the open gate")
	}
}

func TestGateLeavesOthersAlone(t *testing.T) {
	sandbox, peer := newNode(t), newNode(t)
	sandbox.connect("eth0", sandboxAddresses, peer, "veth", peerAddresses)
	c := Connection{Local: netip.MustParseAddrPort("192.0.2.2:1"), Remote: netip.MustParseAddrPort("192.0.2.1:2")}

	unknown := Connection{Local: netip.MustParseAddrPort("192.0.2.9:1"), Remote: c.Remote}
	if err := Close(sandbox.path, []Connection{unknown}); err == nil || !strings.Contains(err.Error(), "192.0.2.9") {
		t.Errorf("an address that is nobody's: %v", err)
	}
	if have := sandbox.rootQdiscs(); len(have) > 0 {
		t.Errorf("made for an address that is nobody's: %v", have)
	}

	// An operator's own, or Kata's rate limiter.
	sandbox.with(func(h *netlink.Handle) error {
		eth0, err := h.LinkByName("eth0")
		if err != nil {
			return err
		}
		return h.QdiscAdd(netlink.NewHtb(netlink.QdiscAttrs{LinkIndex: eth0.Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT}))
	})
	if err := Close(sandbox.path, []Connection{c}); err == nil || !strings.Contains(err.Error(), "eth0: there is a root qdisc already (htb)") {
		t.Errorf("somebody else's qdisc: %v", err)
	}
	if err := Open(sandbox.path); err != nil {
		t.Error(err)
	}
	if have := sandbox.rootQdiscs(); len(have) != 1 {
		t.Errorf("somebody else's qdisc is gone: %v", have)
	}
}

func TestGateOfNoNamespace(t *testing.T) {
	path := filepath.Join(t.TempDir(), "gone")
	if err := Open(path); err != nil {
		t.Errorf("open: %v", err)
	}
	c := Connection{Local: netip.MustParseAddrPort("192.0.2.2:1"), Remote: netip.MustParseAddrPort("192.0.2.1:2")}
	if err := Close(path, []Connection{c}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("close: %v", err)
	}
}
