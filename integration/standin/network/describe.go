// SPDX-License-Identifier: Apache-2.0

package network

import (
	"net"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/api"
)

// describe adds an interface with its addresses, routes and neighbours.
func describe(r *api.UpdateNetworkRequest, link netlink.Link) error {
	addresses, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return err
	}
	routes, err := netlink.RouteList(link, netlink.FAMILY_ALL)
	if err != nil {
		return err
	}
	neighbours, err := netlink.NeighList(link.Attrs().Index, netlink.FAMILY_ALL)
	if err != nil {
		return err
	}
	r.Interfaces = append(r.Interfaces, interfaceOf(link.Attrs(), addresses))
	r.Routes = append(r.Routes, routesOf(link.Attrs().Name, routes)...)
	r.Neighbours = append(r.Neighbours, neighboursOf(link.Attrs().Name, routes, neighbours)...)
	return nil
}

func interfaceOf(link *netlink.LinkAttrs, addresses []netlink.Addr) *api.Interface {
	out := &api.Interface{
		Name: link.Name, Mac: link.HardwareAddr.String(), Mtu: uint32(link.MTU), NoArp: link.RawFlags&unix.IFF_NOARP != 0,
	}
	for _, a := range addresses {
		if !a.IP.IsLoopback() {
			out.Addresses = append(out.Addresses, a.IPNet.String())
		}
	}
	return out
}

// routesOf leaves out the routes that the kernel adds on its own.
func routesOf(link string, routes []netlink.Route) []*api.Route {
	var out []*api.Route
	for _, r := range routes {
		if r.Protocol == unix.RTPROT_KERNEL {
			continue
		}
		route := &api.Route{Interface: link, Scope: uint32(r.Scope), Flags: uint32(r.Flags), Mtu: uint32(r.MTU), Gateway: text(r.Gw), Source: text(r.Src)}
		if r.Dst != nil {
			route.Destination = r.Dst.String()
		}
		out = append(out, route)
	}
	return out
}

// neighboursOf returns permanent entries and resolved gateways.
func neighboursOf(link string, routes []netlink.Route, neighbours []netlink.Neigh) []*api.Neighbour {
	gateways := map[string]bool{}
	for _, r := range routes {
		if r.Gw != nil && isDefault(r.Dst) {
			gateways[r.Gw.String()] = true
		}
	}
	var out []*api.Neighbour
	for _, n := range neighbours {
		known := n.State == netlink.NUD_PERMANENT || n.State == netlink.NUD_REACHABLE && gateways[n.IP.String()]
		if n.HardwareAddr == nil || !known {
			continue
		}
		out = append(out, &api.Neighbour{
			Interface: link, Address: n.IP.String(), Mac: n.HardwareAddr.String(), State: uint32(n.State), Flags: uint32(n.Flags),
		})
	}
	return out
}

func isDefault(destination *net.IPNet) bool {
	if destination == nil {
		return true
	}
	ones, _ := destination.Mask.Size()
	return ones == 0
}

func text(ip net.IP) string {
	if ip == nil {
		return ""
	}
	return ip.String()
}
