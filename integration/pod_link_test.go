// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/netns"
)

// podLink is what a network plugin makes for a pod: a network namespace with an
// interface, eth0, whose other end is on the node.
type podLink struct {
	namespace *netns.Namespace
	link      string // the node's end
	node, pod net.IP
	mac       net.HardwareAddr
}

var linkMask = net.CIDRMask(30, 32)

// mtu of a link is not the usual one, so that it shows whether the guest has
// been given it.
const mtu = 1420

// linkPath is a path for a link's namespace that nobody else has.
func linkPath() string {
	return filepath.Join(netns.Dir, "kata-checkpoint-test-"+hex.EncodeToString(random(4)))
}

// connectedLink makes one with addresses of its own, which goes with the
// scenario if not before.
func (s *scenario) connectedLink(path string) *podLink {
	s.Helper()
	w := s.unconnectedLink()
	var err error
	w.namespace, err = netns.Make(path)
	s.check(err)
	s.check(w.connect())
	s.step("made %s with %s, which is connected to %s", path, w.pod, w.node)
	return w
}

// unconnectedLink makes a link whose second end is on the node, too, until
// somebody takes it.
func (s *scenario) unconnectedLink() *podLink {
	s.Helper()
	address := testAddresses()
	w := &podLink{node: address(1), pod: address(2), link: "kct" + hex.EncodeToString(random(4)), mac: append(net.HardwareAddr{0x02}, random(5)...)}
	s.afterContainers(w.remove)
	s.check(w.create())
	return w
}

// testAddresses is one of the 32768 nets of four addresses in 198.18.0.0/15,
// which is for tests and nobody's.
func testAddresses() func(n uint32) net.IP {
	net4 := 198<<24 | 18<<16 | uint32(binary.BigEndian.Uint16(random(2))>>1)<<2
	return func(n uint32) net.IP { return binary.BigEndian.AppendUint32(nil, net4+n) }
}

// peer is the second end before it is in its namespace.
func (w *podLink) peer() string { return w.link + "p" }

func (w *podLink) create() error {
	err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: w.link, MTU: mtu}, PeerName: w.peer(), PeerHardwareAddr: w.mac})
	if err != nil {
		return fmt.Errorf("make a veth pair: %w", err)
	}
	node, err := netlink.LinkByName(w.link)
	if err == nil {
		err = netlink.AddrAdd(node, &netlink.Addr{IPNet: &net.IPNet{IP: w.node, Mask: linkMask}})
	}
	if err == nil {
		err = netlink.LinkSetUp(node)
	}
	if err != nil {
		return fmt.Errorf("set up %s: %w", w.link, err)
	}
	return nil
}

// connect moves the second end into the namespace.
func (w *podLink) connect() error {
	namespace, err := os.Open(w.namespace.Path)
	if err != nil {
		return err
	}
	defer namespace.Close()
	peer, err := netlink.LinkByName(w.peer())
	if err == nil {
		err = netlink.LinkSetNsFd(peer, int(namespace.Fd()))
	}
	if err != nil {
		return fmt.Errorf("move %s: %w", w.peer(), err)
	}
	return w.namespace.Do(func() error {
		peer, err := netlink.LinkByName(w.peer())
		if err != nil {
			return err
		}
		if err := netlink.LinkSetName(peer, "eth0"); err != nil {
			return err
		}
		if err := netlink.LinkSetMTU(peer, mtu); err != nil {
			return err
		}
		if err := netlink.AddrAdd(peer, &netlink.Addr{IPNet: &net.IPNet{IP: w.pod, Mask: linkMask}}); err != nil {
			return err
		}
		if err := netlink.LinkSetUp(peer); err != nil {
			return err
		}
		return netlink.RouteAdd(&netlink.Route{LinkIndex: peer.Attrs().Index, Gw: w.node})
	})
}

// addToNode gives the node's end one more address, which the pod reaches by its
// default route.
func (w *podLink) addToNode(ip net.IP) error {
	node, err := netlink.LinkByName(w.link)
	if err != nil {
		return err
	}
	return netlink.AddrAdd(node, &netlink.Addr{IPNet: &net.IPNet{IP: ip, Mask: net.CIDRMask(32, 32)}})
}

// reconnect makes the namespace of use for another VM, as it was before Kata had
// it: in a namespace that is not its own Kata's Go shim leaves its ingress qdisc
// and its Rust shim its tap. An interface that was set down has no routes.
func (w *podLink) reconnect() error {
	return w.namespace.Do(func() error {
		peer, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		ingress := &netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: peer.Attrs().Index, Parent: netlink.HANDLE_INGRESS}}
		if err := netlink.QdiscDel(ingress); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("delete Kata's ingress qdisc: %w", err)
		}
		if tap, err := netlink.LinkByName("tap0_kata"); err == nil {
			if err := netlink.LinkDel(tap); err != nil {
				return fmt.Errorf("delete Kata's tap: %w", err)
			}
		}
		if err := netlink.LinkSetUp(peer); err != nil {
			return err
		}
		return netlink.RouteReplace(&netlink.Route{LinkIndex: peer.Attrs().Index, Gw: w.node})
	})
}

// recreateLink recreates the link, with the same addresses: what Kata did to
// its namespace it does not take back.
func (s *scenario) recreateLink(w *podLink) {
	s.Helper()
	path := w.namespace.Path
	s.check(w.remove())
	var err error
	w.namespace, err = netns.Make(path)
	s.check(err)
	s.check(w.create())
	s.check(w.connect())
	s.step("recreated %s", path)
}

// hooks connect the link as those of nerdctl do: once there is a VMM, to the
// network namespace that it is in.
func (w *podLink) hooks() *specs.Hooks {
	inside := []string{
		fmt.Sprintf("link set %s name eth0 mtu %d", w.peer(), mtu), fmt.Sprintf("addr add %s/30 dev eth0", w.pod), "link set eth0 up",
		"route add default via " + w.node.String(),
	}
	script := []string{
		"set -e",
		`pid=$(sed -n 's/.*"pid": *\([0-9]*\).*/\1/p')`,
		fmt.Sprintf("busybox nsenter -t %d -n busybox ip link set %s netns $pid", os.Getpid(), w.peer()), // Kata's Go shim runs hooks in the namespace
	}
	for _, command := range inside {
		script = append(script, "busybox nsenter -t $pid -n busybox ip "+command)
	}
	return &specs.Hooks{CreateRuntime: []specs.Hook{{
		Path: "/bin/sh", Args: []string{"sh", "-c", strings.Join(script, "\n")}, Env: []string{"PATH=" + os.Getenv("PATH")},
	}}}
}

// remove may be called again.
func (w *podLink) remove() error {
	var errs []error
	// The namespace keeps its end for as long as a VM is in it.
	if node, err := netlink.LinkByName(w.link); err == nil {
		if err := netlink.LinkDel(node); !errors.Is(err, unix.ENODEV) { // gone with the namespace
			errs = append(errs, err)
		}
	}
	if w.namespace != nil {
		errs = append(errs, w.namespace.Remove())
	}
	w.namespace = nil
	return errors.Join(errs...)
}
