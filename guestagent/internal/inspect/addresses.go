// SPDX-License-Identifier: Apache-2.0

package inspect

import (
	"fmt"
	"net"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// Address is one of the guest's own.
type Address struct {
	// Interface is the name of the network interface that has it.
	Interface string
	// Addr of an IPv6 link-local address has the interface as its zone: several
	// interfaces may have the same one.
	Addr netip.Addr
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
	interfaces, err := net.Interfaces()
	if err != nil {
		return nil, fmt.Errorf("list network interfaces: %w", err)
	}
	var out []Address
	for _, i := range interfaces {
		if i.Flags&net.FlagLoopback != 0 || i.Flags&net.FlagUp == 0 {
			continue
		}
		list, err := i.Addrs()
		if err != nil {
			return nil, fmt.Errorf("list the addresses of %s: %w", i.Name, err)
		}
		for _, a := range list {
			n, ok := a.(*net.IPNet)
			if !ok {
				continue
			}
			if addr, ok := netip.AddrFromSlice(n.IP); ok {
				out = append(out, NewAddress(i.Name, addr))
			}
		}
	}
	return out, nil
}

// boundTo returns the local end of a socket that is not a TCP connection, which
// has a rule of its own.
func boundTo(socket, kind int) (local netip.AddrPort) {
	name, err := unix.Getsockname(socket)
	if err != nil {
		return local
	}
	if _, err := unix.Getpeername(socket); err == nil && kind == unix.SOCK_STREAM {
		return local
	}
	switch a := name.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port)) //nolint:gosec // a port
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(a.Addr).Unmap(), uint16(a.Port)) //nolint:gosec // a port
	}
	return local
}

// ownAddress warns of the sockets of one process that are bound to an address
// of the container's own, which another container does not have.
func (c *Container) ownAddress(p *Process, bound []netip.AddrPort) []Finding {
	bound = slices.DeleteFunc(bound, func(b netip.AddrPort) bool {
		return !slices.ContainsFunc(c.Addresses, func(a Address) bool { return a.Addr.WithZone("") == b.Addr() })
	})
	if len(bound) == 0 {
		return nil
	}
	what := fmt.Sprintf("has a socket that is bound to the container's own address, %s", bound[0])
	if n := len(bound); n > 1 {
		what += fmt.Sprintf(", and %d more", n-1)
	}
	return []Finding{c.finding(p, rule{Warning, what, "a restore binds it to the address that the container has then"})}
}
