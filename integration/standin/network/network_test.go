// SPDX-License-Identifier: Apache-2.0

package network

import (
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/api"
	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/netns"
)

func cidr(t *testing.T, text string) *net.IPNet {
	t.Helper()
	ip, out, err := net.ParseCIDR(text)
	if err != nil {
		t.Fatal(err)
	}
	out.IP = ip
	return out
}

// pod makes a namespace.
func pod(t *testing.T) *netns.Namespace {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("network namespaces are root's")
	}
	ns, err := netns.Make(filepath.Join(t.TempDir(), "ns"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := ns.Remove(); err != nil {
			t.Error(err)
		}
	})
	return ns
}

func plug(t *testing.T, ns *netns.Namespace, name, address string) {
	t.Helper()
	err := ns.Do(func() error {
		veth := &netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: name, MTU: 1420, HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, name[len(name)-1]}}, PeerName: name + "p",
		}
		if err := netlink.LinkAdd(veth); err != nil {
			return err
		}
		return netlink.AddrAdd(veth, &netlink.Addr{IPNet: cidr(t, address)})
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestEachInterfaceGetsACardOnce(t *testing.T) {
	ns := pod(t)
	n := New(ns)
	for _, step := range []struct {
		name, address string
		want          []string
	}{
		{"eth0", "10.0.0.2/30", []string{"02:00:00:00:00:30"}},
		{"eth1", "10.0.1.2/30", []string{"02:00:00:00:00:31"}},
	} {
		plug(t, ns, step.name, step.address)
		cards, err := n.Attach()
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, c := range cards {
			got = append(got, c.MAC)
		}
		if diff := cmp.Diff(step.want, got); diff != "" {
			t.Errorf("cards of %s (-want +got):\n%s", step.name, diff)
		}
		defer Close(cards)
	}
	if cards, err := n.Attach(); err != nil || len(cards) > 0 {
		t.Errorf("cards for nothing new: %v, %v", cards, err)
	}
	checkRedirections(t, ns, map[string]string{"eth0": "tap0_kata", "tap0_kata": "eth0", "eth1": "tap1_kata", "tap1_kata": "eth1"})

	if err := n.Remove(); err != nil {
		t.Error(err)
	}
	checkRedirections(t, ns, map[string]string{"tap0_kata": "eth0", "tap1_kata": "eth1"}) // which go with the taps
}

func checkRedirections(t *testing.T, ns *netns.Namespace, want map[string]string) {
	t.Helper()
	got := map[string]string{}
	err := ns.Do(func() error {
		links, err := netlink.LinkList()
		if err != nil {
			return err
		}
		for _, link := range links {
			filters, err := netlink.FilterList(link, netlink.MakeHandle(0xffff, 0))
			if err != nil {
				return err
			}
			for _, f := range filters {
				u32, ok := f.(*netlink.U32)
				if !ok || len(u32.Actions) == 0 {
					continue
				}
				to, err := netlink.LinkByIndex(u32.Actions[0].(*netlink.MirredAction).Ifindex)
				if err != nil {
					return err
				}
				got[link.Attrs().Name] = to.Attrs().Name
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("redirections (-want +got):\n%s", diff)
	}
}

func TestANamespaceThatIsGoneNeedsNoRemoval(t *testing.T) {
	ns := pod(t)
	n := New(ns)
	plug(t, ns, "eth0", "10.0.0.2/30")
	cards, err := n.Attach()
	if err != nil {
		t.Fatal(err)
	}
	Close(cards)
	if err := ns.Remove(); err != nil {
		t.Fatal(err)
	}
	if err := n.Remove(); err != nil {
		t.Error(err)
	}
}

func TestTheGuestIsTold(t *testing.T) {
	mac := net.HardwareAddr{2, 0, 0, 0, 0, 1}
	gateway := net.IPv4(10, 0, 0, 1)
	routes := []netlink.Route{
		{Dst: cidr(t, "0.0.0.0/0"), Gw: gateway, Protocol: unix.RTPROT_BOOT},
		{Dst: cidr(t, "10.0.0.0/30"), Src: net.IPv4(10, 0, 0, 2), Scope: netlink.SCOPE_LINK, Protocol: unix.RTPROT_KERNEL},
		{Dst: cidr(t, "10.9.0.0/16"), Scope: netlink.SCOPE_LINK, MTU: 1300, Protocol: unix.RTPROT_STATIC},
	}
	got := &api.UpdateNetworkRequest{
		Interfaces: []*api.Interface{interfaceOf(&netlink.LinkAttrs{Name: "eth0", MTU: 1420, HardwareAddr: mac}, []netlink.Addr{{IPNet: cidr(t, "10.0.0.2/30")}})},
		Routes:     routesOf("eth0", routes),
		Neighbours: neighboursOf("eth0", routes, []netlink.Neigh{
			{IP: gateway, HardwareAddr: mac, State: netlink.NUD_REACHABLE},
			{IP: net.IPv4(10, 0, 0, 3), HardwareAddr: mac, State: netlink.NUD_REACHABLE},
			{IP: net.IPv4(10, 0, 0, 4), HardwareAddr: mac, State: netlink.NUD_PERMANENT},
			{IP: net.IPv4(10, 0, 0, 5), State: netlink.NUD_PERMANENT},
		}),
	}
	want := &api.UpdateNetworkRequest{
		Interfaces: []*api.Interface{{Name: "eth0", Mac: mac.String(), Mtu: 1420, Addresses: []string{"10.0.0.2/30"}}},
		Routes: []*api.Route{
			{Interface: "eth0", Destination: "0.0.0.0/0", Gateway: "10.0.0.1"},
			{Interface: "eth0", Destination: "10.9.0.0/16", Scope: uint32(netlink.SCOPE_LINK), Mtu: 1300},
		},
		Neighbours: []*api.Neighbour{
			{Interface: "eth0", Address: "10.0.0.1", Mac: mac.String(), State: netlink.NUD_REACHABLE},
			{Interface: "eth0", Address: "10.0.0.4", Mac: mac.String(), State: netlink.NUD_PERMANENT},
		},
	}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Errorf("the request (-want +got):\n%s", diff)
	}
}
