// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"encoding/binary"
	"net/netip"
	"path/filepath"
	"slices"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	sk_inet "github.com/checkpoint-restore/go-criu/v7/crit/images/sk-inet"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
)

// filesImage has an entry for each open file and socket of the processes.
const filesImage = "files.img"

// readdressing is what has become of the addresses of the guest that a container
// was checkpointed in.
type readdressing struct {
	// moved has the addresses that this guest lacks, each with the one that takes
	// its place. That is invalid where there is none.
	moved map[netip.Addr]netip.Addr
	// outside are the TCP connections with an end that is not in the image set.
	outside []inspect.Connection
	// closed: CRIU restores no TCP connection, only its socket, unbound.
	closed bool
}

// readdress compares the addresses of two guests.
func readdress(r *api.RestoreRequest) (*readdressing, error) {
	old := make([]inspect.Address, 0, len(r.GetAddresses()))
	for _, a := range r.GetAddresses() {
		addr, err := netip.ParseAddr(a.GetAddress())
		if err != nil || addr.Zone() != "" {
			return nil, errclass.Invalid(errcode.BadAgentRequest, "address %q of the interface %q", a.GetAddress(), a.GetInterface())
		}
		old = append(old, inspect.NewAddress(a.GetInterface(), addr))
	}
	outside, err := connectionsOf(r.GetConnections())
	if err != nil {
		return nil, err
	}
	now, err := inspect.Addresses()
	if err != nil {
		return nil, err
	}
	return &readdressing{moved: movedAddresses(old, now), outside: outside, closed: r.GetOptions().GetTcpClose()}, nil
}

// movedAddresses pairs the addresses that only the old guest has with those
// that only the new one has: in their order on the interface of the same name,
// else the only one of a family with the only other one.
func movedAddresses(old, now []inspect.Address) map[netip.Addr]netip.Addr {
	lost, gained := without(old, now), without(now, old)
	moved := make(map[netip.Addr]netip.Addr)
	taken := make(map[netip.Addr]bool)
	for _, l := range lost {
		moved[l.Addr] = netip.Addr{}
		for _, g := range gained {
			if g.Interface == l.Interface && sameFamily(g.Addr, l.Addr) && !taken[g.Addr] {
				moved[l.Addr], taken[g.Addr] = g.Addr, true
				break
			}
		}
	}
	for _, l := range lost {
		family := func(a inspect.Address) bool { return !sameFamily(a.Addr, l.Addr) }
		from := slices.DeleteFunc(slices.Clone(lost), family)
		to := slices.DeleteFunc(slices.Clone(gained), family)
		// A link-local address belongs to its interface.
		if len(from) == 1 && len(to) == 1 && !l.Addr.IsLinkLocalUnicast() {
			moved[l.Addr] = to[0].Addr
		}
	}
	return moved
}

// without returns the elements of a list whose address is not in another one,
// each address once.
func without(list, other []inspect.Address) (out []inspect.Address) {
	for _, a := range list {
		same := func(b inspect.Address) bool { return a.Addr == b.Addr }
		if !slices.ContainsFunc(other, same) && !slices.ContainsFunc(out, same) {
			out = append(out, a)
		}
	}
	return out
}

func sameFamily(a, b netip.Addr) bool {
	return a.Is4() == b.Is4() && a.IsLinkLocalUnicast() == b.IsLinkLocalUnicast()
}

// check refuses an image set with sockets that cannot be bound in this guest.
func (a *readdressing) check(images string) error {
	_, err := a.edit(images, false)
	return err
}

// apply has CRIU bind the sockets of an image set to this guest's addresses, and
// returns how many move. The images are the copy in the exchange directory: the
// image set itself stays as it is.
func (a *readdressing) apply(images string) (int, error) {
	if err := a.check(images); err != nil {
		return 0, err
	}
	return a.edit(images, true)
}

func (a *readdressing) edit(images string, write bool) (changed int, err error) {
	if len(a.moved) == 0 {
		return 0, nil
	}
	var refused error
	err = editImage(filepath.Join(images, filesImage), func(f *fdinfo.FileEntry) bool {
		s := f.GetIsk()
		if s == nil || refused != nil {
			return false
		}
		moved, err := a.move(s)
		if err != nil {
			refused = err
			return false
		}
		if moved {
			changed++
		}
		return moved && write
	})
	return changed, errclass.Join(refused, err)
}

// move changes the addresses of a socket that this guest lacks: the local one,
// and the remote one of a socket that is connected to the container's own
// address. A TCP connection inside the image set can move with both ends.
func (a *readdressing) move(s *sk_inet.InetSkEntry) (bool, error) {
	local, remote := a.lookUp(s, s.GetSrcAddr()), a.lookUp(s, s.GetDstAddr())
	connection := s.GetProto() == unix.IPPROTO_TCP && s.GetDstPort() != 0
	if !local.moved && !remote.moved || connection && a.closed {
		return false, nil
	}
	src, dst := local.withPort(s.GetSrcPort()), remote.withPort(s.GetDstPort())
	if connection && slices.ContainsFunc(a.outside, func(c inspect.Connection) bool { return c.Local == src && c.Remote == dst }) {
		return false, errcode.ConnectionMoved.Errorf("its open TCP connection from %s to %s can only be kept at the address %s, which this container lacks: "+
			"restore it where it gets that address, or have a checkpoint close connections with the annotation kata-checkpoint.dev/tcp: close", src, dst, src.Addr())
	}
	const lacking = "its %s socket is %s its own address %s, and this container's network interfaces have no address to use in place of it: " +
		"restore it where it gets that address, or one of the same family on the same interface"
	if local.moved {
		if !local.now.IsValid() {
			return false, errcode.AddressLacking.Errorf(lacking, protocolName(s), "bound to", src)
		}
		s.SrcAddr = imageAddress(local.now, len(s.GetSrcAddr()))
	}
	if remote.moved {
		if !remote.now.IsValid() {
			return false, errcode.AddressLacking.Errorf(lacking, protocolName(s), "connected to", dst)
		}
		s.DstAddr = imageAddress(remote.now, len(s.GetDstAddr()))
	}
	return true, nil
}

// end is an address of a socket, and the one that takes its place.
type end struct {
	old, now netip.Addr
	moved    bool
}

func (e end) withPort(port uint32) netip.AddrPort {
	return netip.AddrPortFrom(e.old.WithZone(""), uint16(port)) //nolint:gosec // a port
}

func (a *readdressing) lookUp(s *sk_inet.InetSkEntry, words []uint32) (e end) {
	var ok bool
	if e.old, ok = fromImage(s.GetFamily(), words); !ok {
		return e
	}
	e.old = inspect.NewAddress(s.GetIfname(), e.old).Addr
	e.now, e.moved = a.moved[e.old]
	return e
}

// fromImage reads an address as CRIU's images have it: the bytes on the wire in
// words of the machine (criu/sk-inet.c).
func fromImage(family uint32, words []uint32) (netip.Addr, bool) {
	n := 4
	if family == unix.AF_INET {
		n = 1
	}
	if len(words) < n {
		return netip.Addr{}, false
	}
	var data []byte
	for _, w := range words[:n] {
		data = binary.NativeEndian.AppendUint32(data, w)
	}
	return netip.AddrFromSlice(data)
}

// imageAddress is an address in so many words. IPv4 in those of IPv6 is mapped.
func imageAddress(addr netip.Addr, n int) []uint32 {
	data := addr.AsSlice()
	if n > 1 {
		wide := addr.As16()
		data = wide[:]
	}
	words := make([]uint32, 0, n)
	for ; len(data) > 0; data = data[4:] {
		words = append(words, binary.NativeEndian.Uint32(data))
	}
	return words
}

func protocolName(s *sk_inet.InetSkEntry) string {
	switch {
	case s.GetType() == unix.SOCK_RAW:
		return "raw"
	case s.GetProto() == unix.IPPROTO_TCP:
		return "TCP"
	case s.GetProto() == unix.IPPROTO_UDP:
		return "UDP"
	case s.GetProto() == unix.IPPROTO_UDPLITE:
		return "UDP-Lite"
	}
	return "ICMP"
}
