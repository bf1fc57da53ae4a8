// SPDX-License-Identifier: Apache-2.0

package sockopt

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
)

// group is a multicast group that somebody has joined on an interface.
type group struct {
	iface string
	index int
	addr  netip.Addr
}

// listGroups lists the groups of the calling thread's network namespace. Which
// socket has joined one, only the socket itself tells.
func listGroups() (out []group, err error) {
	for path, parse := range map[string]func(io.Reader) ([]group, error){"/proc/thread-self/net/igmp": parseIGMP, "/proc/thread-self/net/igmp6": parseIGMP6} {
		f, err := os.Open(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // the kernel has no multicast, or no IPv6
		}
		if err != nil {
			return nil, err
		}
		list, err := parse(f)
		f.Close()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		out = append(out, list...)
	}
	return out, nil
}

// parseIGMP reads a line for each interface, with its index and name, and below
// it one for each group, which begins with its address as a number of the machine
// (net/ipv4/igmp.c, igmp_mc_seq_show).
func parseIGMP(r io.Reader) (out []group, err error) {
	var at group
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		line := lines.Text()
		fields := strings.Fields(line)
		switch {
		case len(fields) < 2 || fields[0] == "Idx":
		case line[0] != '\t' && line[0] != ' ':
			if at.index, err = strconv.Atoi(fields[0]); err != nil {
				return nil, fmt.Errorf("line %q: %w", line, err)
			}
			at.iface = fields[1]
		default:
			n, err := strconv.ParseUint(fields[0], 16, 32)
			if err != nil {
				return nil, fmt.Errorf("line %q: %w", line, err)
			}
			at.addr = netip.AddrFrom4([4]byte(binary.NativeEndian.AppendUint32(nil, uint32(n))))
			out = append(out, at)
		}
	}
	return out, lines.Err()
}

// parseIGMP6 reads a line for each group, with the index and name of the interface
// and the bytes of the address (net/ipv6/mcast.c, igmp6_mc_seq_show).
func parseIGMP6(r io.Reader) (out []group, err error) {
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 3 {
			continue
		}
		index, err := strconv.Atoi(fields[0])
		if err != nil {
			return nil, fmt.Errorf("line %q: %w", lines.Text(), err)
		}
		data, err := hex.DecodeString(fields[2])
		addr, ok := netip.AddrFromSlice(data)
		if err != nil || !ok {
			return nil, fmt.Errorf("line %q: no address", lines.Text())
		}
		out = append(out, group{fields[1], index, addr})
	}
	return out, lines.Err()
}

const (
	// maxSources bounds the sources of a membership. The kernel has limits of 10 and
	// 64 by default (igmp_max_msf, mld_max_msf).
	maxSources = 128
	// Of struct group_filter (linux/in.h), with an address in each
	// sockaddr_storage.
	storageSize  = 128
	filterHeader = 8 + storageSize + 8
)

// filter is a struct group_filter.
type filter struct {
	Index   uint32
	_       uint32
	Group   storage
	Mode    uint32
	Count   uint32
	Sources [maxSources]storage
}

// storage is a struct sockaddr_storage.
type storage struct {
	Family uint16
	Data   [storageSize - 2]byte
}

func newStorage(addr netip.Addr) (s storage) {
	if addr.Is4() {
		s.Family = unix.AF_INET
		copy(s.Data[2:], addr.AsSlice()) // behind the port
		return s
	}
	s.Family = unix.AF_INET6
	copy(s.Data[6:], addr.AsSlice()) // behind the port and the flow
	return s
}

func (s *storage) addr() netip.Addr {
	if s.Family == unix.AF_INET {
		return netip.AddrFrom4([4]byte(s.Data[2:6]))
	}
	return netip.AddrFrom16([16]byte(s.Data[6:22]))
}

func levelOf(addr netip.Addr) int {
	if addr.Is4() {
		return unix.SOL_IP
	}
	return unix.SOL_IPV6
}

// memberships returns the groups that a socket has joined.
func memberships(fd, domain int, groups []group) (out []*api.Membership, err error) {
	for _, g := range groups {
		if domain == unix.AF_INET && !g.addr.Is4() {
			continue
		}
		f := filter{Index: uint32(g.index), Group: newStorage(g.addr), Count: maxSources} //nolint:gosec // not negative
		size := uint32(unsafe.Sizeof(f))
		_, _, e := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(levelOf(g.addr)), unix.MCAST_MSFILTER, uintptr(unsafe.Pointer(&f)), uintptr(unsafe.Pointer(&size)), 0)
		switch {
		case e == unix.EADDRNOTAVAIL, e == unix.ENOPROTOOPT, e == unix.EINVAL, e == unix.EOPNOTSUPP:
			continue // not this socket
		case e != 0:
			return nil, os.NewSyscallError("getsockopt", e)
		}
		m := &api.Membership{Interface: g.iface, Group: g.addr.String(), Exclude: f.Mode == unix.MCAST_EXCLUDE}
		for i := range min(f.Count, maxSources) {
			m.Sources = append(m.Sources, f.Sources[i].addr().String())
		}
		out = append(out, m)
	}
	return out, nil
}

// join joins a group, on the interface of the same name.
func join(fd int, m *api.Membership) error {
	addr, err := netip.ParseAddr(m.GetGroup())
	if err != nil {
		return err
	}
	if len(m.GetSources()) > maxSources {
		return fmt.Errorf("%d sources", len(m.GetSources()))
	}
	i, err := net.InterfaceByName(m.GetInterface())
	if err != nil {
		return err
	}
	f := filter{Index: uint32(i.Index), Group: newStorage(addr), Mode: unix.MCAST_INCLUDE, Count: uint32(len(m.GetSources()))} //nolint:gosec // far less
	if m.GetExclude() {
		f.Mode = unix.MCAST_EXCLUDE
	}
	for n, text := range m.GetSources() {
		source, err := netip.ParseAddr(text)
		if err != nil {
			return err
		}
		f.Sources[n] = newStorage(source)
	}
	// A struct group_req is the beginning of it. An earlier restore may have joined.
	set := func(name int, size uintptr) unix.Errno {
		_, _, e := unix.Syscall6(unix.SYS_SETSOCKOPT, uintptr(fd), uintptr(levelOf(addr)), uintptr(name), uintptr(unsafe.Pointer(&f)), size, 0)
		return e
	}
	if e := set(unix.MCAST_JOIN_GROUP, 8+storageSize); e != 0 && e != unix.EADDRINUSE {
		return os.NewSyscallError("setsockopt", e)
	}
	if m.GetExclude() && len(m.GetSources()) == 0 {
		return nil
	}
	if e := set(unix.MCAST_MSFILTER, filterHeader+uintptr(f.Count)*storageSize); e != 0 {
		return os.NewSyscallError("setsockopt", e)
	}
	return nil
}
