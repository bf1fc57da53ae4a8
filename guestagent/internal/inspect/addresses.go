// SPDX-License-Identifier: Apache-2.0

package inspect

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
)

// Address is one of the guest's own.
type Address struct {
	// Interface is the name of the network interface that has it.
	Interface string
	// Addr of an IPv6 link-local address has the interface as its zone: several
	// interfaces may have the same one.
	Addr netip.Addr
	// Made: somebody in the guest has made the interface, such as a bridge, where a
	// hypervisor's are devices. Another guest lacks it.
	Made bool
}

// NewAddress is the address of an interface, without a zone.
func NewAddress(iface string, addr netip.Addr) Address {
	addr = addr.Unmap()
	if addr.Is6() && addr.IsLinkLocalUnicast() {
		addr = addr.WithZone(iface)
	}
	return Address{Interface: iface, Addr: addr}
}

// Addresses lists the addresses of the calling process's network namespace that
// others may reach: those of interfaces that are up, the loopback interface
// excepted. They are in the kernel's order.
func Addresses() ([]Address, error) {
	out, _, err := interfaces()
	return out, err
}

// interfaces is Addresses, and the names of those interfaces that somebody in the
// guest has made, by their indices, whether or not they have an address.
func interfaces() (out []Address, made map[int]string, err error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, nil, fmt.Errorf("list network interfaces: %w", err)
	}
	made = make(map[int]string)
	for _, link := range links {
		l := link.Attrs()
		if link.Type() != "device" {
			made[l.Index] = l.Name
		}
		if l.Flags&net.FlagLoopback != 0 || l.Flags&net.FlagUp == 0 {
			continue
		}
		list, err := netlink.AddrList(link, netlink.FAMILY_ALL)
		if err != nil {
			return nil, nil, fmt.Errorf("list the addresses of %s: %w", l.Name, err)
		}
		for _, a := range list {
			if addr, ok := netip.AddrFromSlice(a.IP); ok {
				own := NewAddress(l.Name, addr)
				own.Made = link.Type() != "device"
				out = append(out, own)
			}
		}
	}
	return out, made, nil
}

// boundTo returns the local end of a socket that is not a TCP connection, which
// has a rule of its own, and whether it may be bound to an address that the
// machine lacks.
func boundTo(socket, kind int) (local netip.AddrPort, anywhere bool) {
	name, err := unix.Getsockname(socket)
	if err != nil {
		return local, false
	}
	if _, err := unix.Getpeername(socket); err == nil && kind == unix.SOCK_STREAM {
		return local, false
	}
	switch a := name.(type) {
	case *unix.SockaddrInet4:
		local = netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port)) //nolint:gosec // a port
	case *unix.SockaddrInet6:
		local = netip.AddrPortFrom(netip.AddrFrom16(a.Addr).Unmap(), uint16(a.Port)) //nolint:gosec // a port
	}
	for _, option := range [][2]int{{unix.SOL_IP, unix.IP_FREEBIND}, {unix.SOL_IP, unix.IP_TRANSPARENT}, {unix.SOL_IPV6, unix.IPV6_FREEBIND}, {unix.SOL_IPV6, unix.IPV6_TRANSPARENT}} {
		if on, err := unix.GetsockoptInt(socket, option[0], option[1]); err == nil && on != 0 {
			anywhere = true
		}
	}
	return local, anywhere
}

// everywhere reports whether a socket can be bound to an address in any guest.
func everywhere(a netip.Addr) bool {
	return a.IsUnspecified() || a.IsLoopback() || a.IsMulticast() || a == netip.AddrFrom4([4]byte{255, 255, 255, 255})
}

// absent reports whether no interface has an IPv6 address, not even one that is
// down. A socket can be bound to it nevertheless (IP_FREEBIND, which its program
// may have switched off since), and CRIU binds all sockets of IPv6 so (inet_bind in
// criu/sk-inet.c): it is as much of a loss in another guest as in this one.
func absent(a netip.Addr) bool {
	if !a.Is6() || a.IsLinkLocalUnicast() {
		return false
	}
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	return errors.Is(unix.Bind(fd, &unix.SockaddrInet6{Addr: a.As16()}), unix.EADDRNOTAVAIL)
}

// ownAddress finds the sockets of one process that are bound to an address of the
// container's own, which another container does not have. A restore binds them to
// the address that takes its place. Where none does, the restore would fail, and
// the checkpoint is refused: an address that no interface has, or one that somebody
// has made in the guest. Stays: whoever restores it sees to that.
func (c *Container) ownAddress(p *Process, bound []netip.AddrPort, stays bool) (out []Finding) {
	var own, lost []netip.AddrPort
	for _, b := range bound {
		i := slices.IndexFunc(c.Addresses, func(a Address) bool { return a.Addr.WithZone("") == b.Addr() })
		switch {
		case i >= 0 && !c.Addresses[i].Made:
			own = append(own, b)
		case !everywhere(b.Addr()) && (i >= 0 || !absent(b.Addr())):
			lost = append(lost, b)
		}
	}
	if len(own) > 0 {
		out = append(out, c.finding(p, rule{class: Warning, what: "has a socket that is bound to the container's own address, " + first(own), advice: "a restore binds it to the address that the container has then"}))
	}
	if len(lost) > 0 {
		r := rule{Refused, errcode.ForeignAddress, "has a socket that is bound to " + first(lost) + ", which is the address of no network interface that a restored container has",
			"have it listen at any address or at the container's own, or create the container with the annotation kata-checkpoint.dev/address: stays, and restore it where that address exists"}
		if stays {
			r.class, r.advice = Warning, "it can be restored only where that address exists"
		}
		out = append(out, c.finding(p, r))
	}
	return out
}

// onMadeInterface is about sockets of a process that are bound to interfaces that
// somebody has made in the guest, by their names. Stays is as for [Container.ownAddress].
func (c *Container) onMadeInterface(p *Process, names []string, stays bool) (out []Finding) {
	for _, name := range names {
		r := rule{Refused, errcode.ForeignAddress, "has a socket that is bound to the network interface " + name + ", which a restored container does not have",
			"close it before the checkpoint, or create the container with the annotation kata-checkpoint.dev/address: stays, and restore it where that interface exists"}
		if stays {
			r.class, r.advice = Warning, "it can be restored only where that interface exists"
		}
		out = append(out, c.finding(p, r))
	}
	return out
}

// boundInterface is the index of the interface that a socket is bound to, or 0.
func boundInterface(socket, domain int) int {
	if domain == unix.AF_PACKET {
		name, err := unix.Getsockname(socket)
		if a, ok := name.(*unix.SockaddrLinklayer); ok && err == nil {
			return a.Ifindex
		}
		return 0
	}
	index, err := unix.GetsockoptInt(socket, unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX)
	if err != nil {
		return 0
	}
	return index
}

// first names the first of some addresses, and how many more there are.
func first(list []netip.AddrPort) string {
	if n := len(list); n > 1 {
		return fmt.Sprintf("%s, and %d more", list[0], n-1)
	}
	return list[0].String()
}
