// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"fmt"
	"net"
	"os"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/api"
	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/internal/thread"
)

// TestTheGuestTakesItsInterfacesOver: two cards, each with the name that the
// other one is to have.
func TestTheGuestTakesItsInterfacesOver(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("network namespaces are root's")
	}
	first, second := net.HardwareAddr{2, 0, 0, 0, 0, 1}, net.HardwareAddr{2, 0, 0, 0, 0, 2}
	request := &api.UpdateNetworkRequest{
		Interfaces: []*api.Interface{
			{Name: "eth1", Mac: first.String(), Mtu: 1420, Addresses: []string{"10.0.0.2/30"}},
			{Name: "eth0", Mac: second.String(), Mtu: 1500, Addresses: []string{"10.0.1.2/30", "10.0.2.2/32"}},
		},
		Routes: []*api.Route{
			{Interface: "eth1", Destination: "0.0.0.0/0", Gateway: "10.9.0.1"}, // reached by the next
			{Interface: "eth1", Destination: "10.9.0.0/16", Scope: uint32(netlink.SCOPE_LINK)},
		},
		Neighbours: []*api.Neighbour{{Interface: "eth0", Address: "10.0.1.1", Mac: first.String(), State: netlink.NUD_PERMANENT}},
	}
	var got []string
	err := thread.Do(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		for name, mac := range map[string]net.HardwareAddr{"eth0": first, "eth1": second} {
			if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name, HardwareAddr: mac}, PeerName: name + "p"}); err != nil {
				return err
			}
			peer, err := netlink.LinkByName(name + "p")
			if err != nil {
				return err
			}
			if err := netlink.LinkSetUp(peer); err != nil {
				return err
			}
		}
		if err := updateNetwork(request); err != nil {
			return err
		}
		var err error
		got, err = looks(first, second)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"eth1 10.0.0.2/30 mtu 1420", "route 10.0.0.0/30 via <nil>", "route 10.9.0.0/16 via <nil>", "route 0.0.0.0/0 via 10.9.0.1",
		"eth0 10.0.1.2/30 mtu 1500", "eth0 10.0.2.2/32 mtu 1500", "route 10.0.1.0/30 via <nil>", "neighbour 10.0.1.1",
	}
	slices.Sort(want)
	slices.Sort(got)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("the guest's network (-want +got):\n%s", diff)
	}
}

// looks lists what there is of the links with certain addresses.
func looks(macs ...net.HardwareAddr) ([]string, error) {
	var out []string
	for _, mac := range macs {
		link, err := linkByMAC(mac)
		if err != nil {
			return nil, err
		}
		addresses, err := netlink.AddrList(link, netlink.FAMILY_V4)
		if err != nil {
			return nil, err
		}
		for _, a := range addresses {
			out = append(out, fmt.Sprintf("%s %s mtu %d", link.Attrs().Name, a.IPNet, link.Attrs().MTU))
		}
		routes, err := netlink.RouteList(link, netlink.FAMILY_V4)
		if err != nil {
			return nil, err
		}
		for _, r := range routes {
			out = append(out, fmt.Sprintf("route %s via %s", r.Dst, r.Gw))
		}
		neighbours, err := netlink.NeighList(link.Attrs().Index, netlink.FAMILY_V4)
		if err != nil {
			return nil, err
		}
		for _, n := range neighbours {
			if n.State == netlink.NUD_PERMANENT {
				out = append(out, "neighbour "+n.IP.String())
			}
		}
	}
	return out, nil
}
