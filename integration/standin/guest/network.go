// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/api"
)

// plugTimeout bounds the wait for a card that was plugged in while the guest
// booted.
const plugTimeout = 20 * time.Second

// updateNetwork sets the guest's interfaces up as requested. Kata:
// src/agent/src/netlink.rs.
func updateNetwork(r *api.UpdateNetworkRequest) error {
	for _, i := range r.Interfaces {
		if err := setInterface(i); err != nil {
			return fmt.Errorf("set up interface %s: %w", i.Name, err)
		}
	}
	// Routes with a gateway need the others to reach it.
	routes := slices.Clone(r.Routes)
	slices.SortStableFunc(routes, func(a, b *api.Route) int { return min(len(a.Gateway), 1) - min(len(b.Gateway), 1) })
	for _, route := range routes {
		if err := addRoute(route); err != nil {
			return fmt.Errorf("add the route to %s: %w", route.Destination, err)
		}
	}
	for _, n := range r.Neighbours {
		if err := addNeighbour(n); err != nil {
			return fmt.Errorf("add the neighbour %s: %w", n.Address, err)
		}
	}
	return nil
}

func setInterface(i *api.Interface) error {
	mac, err := net.ParseMAC(i.Mac)
	if err != nil {
		return err
	}
	link, err := linkByMAC(mac)
	if err != nil {
		return err
	}
	if err := netlink.LinkSetDown(link); err != nil {
		return err
	}
	if err := rename(link, i.Name); err != nil {
		return fmt.Errorf("rename %s: %w", link.Attrs().Name, err)
	}
	if err := netlink.LinkSetMTU(link, int(i.Mtu)); err != nil {
		return fmt.Errorf("set the MTU: %w", err)
	}
	if i.NoArp {
		if err := netlink.LinkSetARPOff(link); err != nil {
			return fmt.Errorf("disable ARP: %w", err)
		}
	}
	for _, text := range i.Addresses {
		address, err := netlink.ParseAddr(text)
		if err != nil {
			return err
		}
		if address.IP.To4() == nil && !hasIPv6() {
			continue
		}
		if err := netlink.AddrReplace(link, address); err != nil {
			return fmt.Errorf("add the address %s: %w", text, err)
		}
	}
	return netlink.LinkSetUp(link)
}

// linkByMAC waits for the link.
func linkByMAC(mac net.HardwareAddr) (netlink.Link, error) {
	changes, done := make(chan netlink.LinkUpdate), make(chan struct{})
	if err := netlink.LinkSubscribe(changes, done); err != nil {
		return nil, fmt.Errorf("watch links: %w", err)
	}
	defer func() {
		close(done)
		go func() {
			for range changes { // closed when the watch ends
			}
		}()
	}()
	for timeout := time.After(plugTimeout); ; {
		links, err := netlink.LinkList()
		if err != nil {
			return nil, fmt.Errorf("list links: %w", err)
		}
		for _, link := range links {
			if bytes.Equal(link.Attrs().HardwareAddr, mac) {
				return link, nil
			}
		}
		select {
		case <-changes:
		case <-timeout:
			return nil, fmt.Errorf("no card has the address %s", mac)
		}
	}
}

// rename gives a link a name. A link that already has it gets the old name in
// exchange.
func rename(link netlink.Link, name string) error {
	old := link.Attrs().Name
	if old == name {
		return nil
	}
	other, err := netlink.LinkByName(name)
	if err != nil {
		if errors.As(err, &netlink.LinkNotFoundError{}) {
			return netlink.LinkSetName(link, name)
		}
		return err
	}
	if err := netlink.LinkSetDown(other); err != nil {
		return err
	}
	if err := netlink.LinkSetName(other, old+"_temp"); err != nil {
		return err
	}
	if err := netlink.LinkSetName(link, name); err != nil {
		return err
	}
	if err := netlink.LinkSetName(other, old); err != nil {
		return err
	}
	return netlink.LinkSetUp(other)
}

func hasIPv6() bool {
	disabled, err := os.ReadFile("/proc/sys/net/ipv6/conf/all/disable_ipv6")
	return err == nil && bytes.Equal(bytes.TrimSpace(disabled), []byte("0"))
}

func addRoute(r *api.Route) error {
	link, err := netlink.LinkByName(r.Interface)
	if err != nil {
		return err
	}
	route := &netlink.Route{
		LinkIndex: link.Attrs().Index, Scope: netlink.Scope(r.Scope), Flags: int(r.Flags), MTU: int(r.Mtu), Protocol: unix.RTPROT_BOOT,
		Gw: net.ParseIP(r.Gateway), Src: net.ParseIP(r.Source),
	}
	if r.Destination != "" {
		if _, route.Dst, err = net.ParseCIDR(r.Destination); err != nil {
			return err
		}
		if route.Dst.IP.To4() == nil && !hasIPv6() {
			return nil
		}
	}
	return netlink.RouteReplace(route)
}

func addNeighbour(n *api.Neighbour) error {
	link, err := netlink.LinkByName(n.Interface)
	if err != nil {
		return err
	}
	mac, err := net.ParseMAC(n.Mac)
	if err != nil {
		return err
	}
	ip := net.ParseIP(n.Address)
	if ip.To4() == nil && !hasIPv6() {
		return nil
	}
	return netlink.NeighSet(&netlink.Neigh{LinkIndex: link.Attrs().Index, IP: ip, HardwareAddr: mac, State: int(n.State), Flags: int(n.Flags)})
}
