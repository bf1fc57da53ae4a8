package integration

import (
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"

	"github.com/kata-checkpoint/kata-checkpoint/integration/netns"
)

// wire is what a network plugin makes for a pod: a network namespace with an interface, eth0, whose other end is on the node.
type wire struct {
	namespace *netns.Namespace
	link      string // the node's end
	node, pod net.IP
	mac       net.HardwareAddr
}

// mtu of a wire is not the usual one, so that it tells whether the guest has been told.
const mtu = 1420

// wirePath is a path for a wire's namespace that nobody else has.
func wirePath() string {
	return filepath.Join(netns.Dir, "kata-checkpoint-test-"+hex.EncodeToString(random(4)))
}

func random(n int) []byte {
	out := make([]byte, n)
	_, _ = rand.Read(out) // never fails
	return out
}

// wire makes one with addresses of its own, which goes with the scenario if not before.
func (s *scenario) wire(path string) *wire {
	s.Helper()
	// One of the 32768 nets of four addresses in 198.18.0.0/15, which is for tests and nobody's.
	net4 := 198<<24 | 18<<16 | uint32(binary.BigEndian.Uint16(random(2))>>1)<<2
	address := func(n uint32) net.IP { return binary.BigEndian.AppendUint32(nil, net4+n) }
	w := &wire{node: address(1), pod: address(2), link: "kct" + hex.EncodeToString(random(4))}
	s.later(w.remove)
	var err error
	w.namespace, err = netns.Make(path)
	s.check(err)
	s.check(w.connect())
	s.step("made %s with %s, which is connected to %s", path, w.pod, w.node)
	return w
}

func (w *wire) connect() error {
	mask := net.CIDRMask(30, 32)
	w.mac = append(net.HardwareAddr{0x02}, random(5)...)
	pair := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: w.link, MTU: mtu}, PeerName: w.link + "p", PeerHardwareAddr: w.mac}
	if err := netlink.LinkAdd(pair); err != nil {
		return fmt.Errorf("make a veth pair: %w", err)
	}
	node, err := netlink.LinkByName(w.link)
	if err != nil {
		return err
	}
	peer, err := netlink.LinkByName(pair.PeerName)
	if err != nil {
		return err
	}
	err = errors.Join(netlink.AddrAdd(node, &netlink.Addr{IPNet: &net.IPNet{IP: w.node, Mask: mask}}), netlink.LinkSetUp(node))
	if err != nil {
		return fmt.Errorf("set up %s: %w", w.link, err)
	}
	namespace, err := os.Open(w.namespace.Path)
	if err != nil {
		return err
	}
	defer namespace.Close()
	if err := netlink.LinkSetNsFd(peer, int(namespace.Fd())); err != nil {
		return fmt.Errorf("move the veth's end: %w", err)
	}
	return w.namespace.Do(func() error {
		peer, err := netlink.LinkByName(pair.PeerName)
		if err != nil {
			return err
		}
		if err := netlink.LinkSetName(peer, "eth0"); err != nil {
			return err
		}
		if err := netlink.LinkSetMTU(peer, mtu); err != nil {
			return err
		}
		if err := netlink.AddrAdd(peer, &netlink.Addr{IPNet: &net.IPNet{IP: w.pod, Mask: mask}}); err != nil {
			return err
		}
		if err := netlink.LinkSetUp(peer); err != nil {
			return err
		}
		return netlink.RouteAdd(&netlink.Route{LinkIndex: peer.Attrs().Index, Gw: w.node})
	})
}

// remove may be called again.
func (w *wire) remove() error {
	var errs []error
	// The namespace keeps its end for as long as a VM is in it.
	if node, err := netlink.LinkByName(w.link); err == nil {
		errs = append(errs, netlink.LinkDel(node))
	}
	if w.namespace != nil {
		errs = append(errs, w.namespace.Remove())
	}
	w.namespace = nil
	return errors.Join(errs...)
}
