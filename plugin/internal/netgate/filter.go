// SPDX-License-Identifier: Apache-2.0

package netgate

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// filters send what leaves of the connections to the class that drops it, one
// filter for each.
func filters(link int, connections []Connection) []*netlink.U32 {
	coarse := len(connections) > maxConnections
	seen := make(map[Connection]bool, len(connections))
	var out []*netlink.U32
	for _, c := range connections {
		if coarse {
			c = Connection{Local: netip.AddrPortFrom(c.Local.Addr(), 0)}
		}
		if !seen[c] {
			seen[c] = true
			out = append(out, filter(link, c))
		}
	}
	return out
}

// filter matches the packets of a connection by their headers: words of 32 bits
// at offsets from the network header. Without a remote end it matches all TCP
// from the address. An IPv4 header with options does not come of TCP.
func filter(link int, c Connection) *netlink.U32 {
	// A priority has filters of one protocol only.
	f := &netlink.U32{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: link, Parent: root, Priority: 1, Protocol: unix.ETH_P_IP},
		ClassId:     drop,
	}
	protocol := netlink.TcU32Key{Off: 8, Mask: 0x00ff0000, Val: unix.IPPROTO_TCP << 16}
	source, destination, ports := int32(12), int32(16), int32(20)
	if c.Local.Addr().Is6() {
		f.Priority, f.Protocol = 2, unix.ETH_P_IPV6
		protocol = netlink.TcU32Key{Off: 4, Mask: 0x0000ff00, Val: unix.IPPROTO_TCP << 8}
		source, destination, ports = 8, 24, 40
	}
	keys := append([]netlink.TcU32Key{protocol}, addressAt(source, c.Local.Addr())...)
	if c.Remote.IsValid() {
		keys = append(keys, addressAt(destination, c.Remote.Addr())...)
		keys = append(keys, netlink.TcU32Key{Off: ports, Mask: 0xffffffff, Val: uint32(c.Local.Port())<<16 | uint32(c.Remote.Port())})
	}
	f.Sel = &netlink.TcU32Sel{Flags: netlink.TC_U32_TERMINAL, Keys: keys, Nkeys: uint8(len(keys))} //nolint:gosec // 10 at most
	return f
}

func addressAt(offset int32, address netip.Addr) (keys []netlink.TcU32Key) {
	for raw := address.AsSlice(); len(raw) > 0; raw, offset = raw[4:], offset+4 {
		keys = append(keys, netlink.TcU32Key{Off: offset, Mask: 0xffffffff, Val: binary.BigEndian.Uint32(raw)})
	}
	return keys
}

// match tells filters apart by what they match.
func match(f *netlink.U32) string {
	text := fmt.Sprint(f.Protocol, f.ClassId)
	if f.Sel != nil {
		text += fmt.Sprint(f.Sel.Keys)
	}
	return text
}
