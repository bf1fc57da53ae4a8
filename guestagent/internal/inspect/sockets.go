// SPDX-License-Identifier: Apache-2.0

package inspect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	diag "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/thread"
)

// Connection is an open TCP connection.
type Connection struct {
	// PID and FD are of one of the processes that have it open.
	PID, FD       int
	Local, Remote netip.AddrPort
	// Inside: the other end is one of the same processes', or gone.
	Inside bool
	// Here: the other end is a socket in the same network namespace.
	Here bool
	// Ended: the other end, outside, has closed it, and nothing is left to be read
	// or sent, as after a probe that only connects. It is not known whether that
	// end still waits for an answer.
	Ended bool
	// Exec is the process of an exec in the same container that has the other
	// end, or nil.
	Exec *Process
}

// Outside returns the connections whose other end is not the container's own and
// still there.
func Outside(list []Connection) []Connection {
	return slices.DeleteFunc(slices.Clone(list), func(c Connection) bool { return c.Inside || c.Ended })
}

// sockets are those of processes.
type sockets struct {
	// owners has the inode of each socket, and one of the processes with it, one of
	// an exec only if no other has it.
	owners map[uint32]owner
	// unix has the unix sockets in the network namespaces of the processes, by
	// their inodes.
	unix        map[uint32]unixSocket
	connections []Connection
}

type unixSocket struct {
	// peer is the inode of the other end, or 0.
	peer uint32
	// datagram: it is of the type SOCK_DGRAM.
	datagram bool
	// named: it is bound.
	named bool
	// pending are the inodes of those that wait to be accepted, 0 for one that has
	// been closed again.
	pending []uint32
	// unread: it has messages to read. A listener has none.
	unread bool
	// unsent: what it has sent has not been read yet.
	unsent bool
}

type owner struct {
	process *Process
	fd      int
}

// Connections lists the open TCP connections of processes, each once.
func Connections(processes []*Process) ([]Connection, error) {
	s, err := readSockets(processes)
	return s.connections, err
}

func readSockets(processes []*Process) (sockets, error) {
	s := sockets{owners: make(map[uint32]owner), unix: make(map[uint32]unixSocket)}
	namespaces := make(map[string]int) // with one of the processes in each
	for _, p := range processes {
		for _, f := range p.Files {
			inode, ok := socketInode(f.Name)
			if !ok {
				continue
			}
			if _, seen := s.owners[inode]; !seen {
				s.owners[inode] = owner{p, f.FD}
			}
			namespaces[p.Namespaces["net"]] = p.PID
		}
	}
	for _, pid := range namespaces {
		err := thread.Do(func() error {
			if err := thread.Enter(pid, "net"); err != nil {
				return err
			}
			return s.readNamespace()
		})
		if gone(err) {
			continue // the process has exited
		}
		if err != nil {
			return s, fmt.Errorf("sockets of process %d: %w", pid, err)
		}
	}
	slices.SortFunc(s.connections, func(a, b Connection) int {
		if a.PID != b.PID {
			return a.PID - b.PID
		}
		return a.FD - b.FD
	})
	return s, nil
}

// Descriptor is one of a process.
type Descriptor struct {
	// PID is the process's in the guest's root PID namespace, and Inner in its own.
	PID, Inner int
	FD         int
}

// Sockets are those of the container's processes, each by one of its descriptors.
func (c *Container) Sockets() (out []Descriptor) {
	seen := make(map[uint32]bool)
	for _, p := range c.Processes {
		for _, f := range p.Files {
			if inode, ok := socketInode(f.Name); ok && !p.Exec && !seen[inode] {
				seen[inode] = true
				out = append(out, Descriptor{PID: p.PID, Inner: p.PIDs[len(p.PIDs)-1], FD: f.FD})
			}
		}
	}
	return out
}

// readNamespace asks the kernel for the sockets of the calling thread's network
// namespace. Kernels without sock_diag for a family answer ENOENT.
func (s *sockets) readNamespace() error {
	var all []*netlink.Socket
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		list, err := netlink.SocketDiagTCP(family)
		if errors.Is(err, fs.ErrNotExist) {
			return errclass.Precondition(errcode.KernelOption, "the guest kernel lacks CONFIG_INET_TCP_DIAG: give Kata a kernel with the options of configs/kernel")
		}
		if err != nil {
			return fmt.Errorf("list TCP sockets: %w", err)
		}
		all = append(all, list...)
	}
	s.addTCP(all)
	found, err := unixSockets()
	if errors.Is(err, fs.ErrNotExist) {
		return nil // CRIU will report it
	}
	if err != nil {
		return fmt.Errorf("list unix sockets: %w", err)
	}
	maps.Copy(s.unix, found)
	return nil
}

// closedStates are those of sockets without a connection.
var closedStates = []uint8{unix.BPF_TCP_TIME_WAIT, unix.BPF_TCP_CLOSE, unix.BPF_TCP_LISTEN}

// endpoints identify a connection, as one of its ends has it.
type endpoints struct{ local, remote netip.AddrPort }

func endpointsOf(t *netlink.Socket) endpoints {
	return endpoints{addrPort(t.ID.Source, t.ID.SourcePort), addrPort(t.ID.Destination, t.ID.DestinationPort)}
}

// addTCP notes the connections that one of the processes has open, among all
// sockets of a network namespace.
func (s *sockets) addTCP(all []*netlink.Socket) {
	others := make(map[endpoints]*netlink.Socket, len(all))
	listening := make(map[uint16]bool) // for the processes
	for _, t := range all {
		if t.State != unix.BPF_TCP_LISTEN {
			others[endpointsOf(t)] = t
		} else if o, ok := s.owners[t.INode]; ok && !o.process.Exec {
			listening[t.ID.SourcePort] = true
		}
	}
	for _, t := range all {
		o, ok := s.owners[t.INode]
		if !ok || o.process.Exec || slices.Contains(closedStates, t.State) {
			continue
		}
		e := endpointsOf(t)
		c := Connection{PID: o.process.PID, FD: o.fd, Local: e.local, Remote: e.remote}
		// A socket without an inode is no process's: it is not accepted yet, or closed.
		other := others[endpoints{e.remote, e.local}]
		c.Here = other != nil
		switch {
		case other == nil:
			c.Inside = e.remote.Addr().IsLoopback() // the kernel has forgotten the other end
		case other.INode != 0:
			var peer owner
			if peer, c.Inside = s.owners[other.INode]; c.Inside && peer.process.Exec {
				c.Exec, c.Inside = peer.process, false
			}
		case other.State == unix.BPF_TCP_FIN_WAIT2, other.State == unix.BPF_TCP_TIME_WAIT:
			c.Inside = true // closed, and everything that was sent has arrived
		default:
			c.Inside = listening[e.remote.Port()]
		}
		// The FIN counts as a byte to be read.
		c.Ended = !c.Inside && c.Exec == nil && t.State == unix.BPF_TCP_CLOSE_WAIT && t.RQueue <= 1 && t.WQueue == 0
		s.connections = append(s.connections, c)
	}
}

// addrPort unmaps IPv4-mapped IPv6 addresses, which are IPv4 on the wire.
func addrPort(ip net.IP, port uint16) netip.AddrPort {
	addr, _ := netip.AddrFromSlice(ip)
	return netip.AddrPortFrom(addr.Unmap(), port)
}

// socketInode reads a descriptor's name in /proc, socket:[INODE].
func socketInode(name string) (uint32, bool) {
	rest, ok := strings.CutPrefix(name, "socket:[")
	if !ok {
		return 0, false
	}
	// sock_diag has 32 bits for it.
	n, err := strconv.ParseUint(strings.TrimSuffix(rest, "]"), 10, 32)
	return uint32(n), err == nil && n != 0
}

// Of linux/unix_diag.h.
const (
	udiagShowName  = 1  // UDIAG_SHOW_NAME
	udiagShowPeer  = 4  // UDIAG_SHOW_PEER
	udiagShowIcons = 8  // UDIAG_SHOW_ICONS
	udiagShowQueue = 16 // UDIAG_SHOW_RQLEN
	unixDiagName   = 0  // UNIX_DIAG_NAME
	unixDiagPeer   = 2  // UNIX_DIAG_PEER: the inode of the other end
	unixDiagIcons  = 3  // UNIX_DIAG_ICONS: inodes
	unixDiagQueue  = 4  // UNIX_DIAG_RQLEN: two sizes in bytes
	unixDiagHeader = 16
)

// unixSockets lists the unix sockets in the calling thread's network namespace.
// [netlink.UnixSocketDiagInfo] of release 1.3.1 stops at the first datagram
// socket: it takes a socket's type for its family.
func unixSockets() (map[uint32]unixSocket, error) {
	conn, err := diag.Dial(unix.NETLINK_SOCK_DIAG, nil)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	// struct unix_diag_req: family, protocol, padding, states, inode, what to
	// show, cookie.
	request := binary.NativeEndian.AppendUint32([]byte{unix.AF_UNIX, 0, 0, 0}, ^uint32(0))
	request = binary.NativeEndian.AppendUint32(request, 0)
	request = binary.NativeEndian.AppendUint32(request, udiagShowName|udiagShowPeer|udiagShowIcons|udiagShowQueue)
	request = append(request, make([]byte, 8)...)
	messages, err := conn.Execute(diag.Message{
		Header: diag.Header{Type: unix.SOCK_DIAG_BY_FAMILY, Flags: diag.Request | diag.Dump},
		Data:   request,
	})
	if err != nil {
		return nil, err
	}
	out := make(map[uint32]unixSocket)
	for _, m := range messages {
		// struct unix_diag_msg: family, type, state, padding, inode, cookie.
		if len(m.Data) < unixDiagHeader {
			return nil, fmt.Errorf("a message of %d bytes", len(m.Data))
		}
		attributes, err := diag.NewAttributeDecoder(m.Data[unixDiagHeader:])
		if err != nil {
			return nil, err
		}
		s := unixSocket{datagram: m.Data[1] == unix.SOCK_DGRAM}
		listens := m.Data[2] == unix.BPF_TCP_LISTEN
		for attributes.Next() {
			switch attributes.Type() {
			case unixDiagIcons:
				for icons := attributes.Bytes(); len(icons) >= 4; icons = icons[4:] {
					s.pending = append(s.pending, binary.NativeEndian.Uint32(icons))
				}
			case unixDiagQueue:
				// A listener's are the numbers of its connections.
				if sizes := attributes.Bytes(); len(sizes) >= 8 && !listens {
					s.unread = binary.NativeEndian.Uint32(sizes) > 0
					s.unsent = binary.NativeEndian.Uint32(sizes[4:]) > 0
				}
			case unixDiagName:
				s.named = true
			case unixDiagPeer:
				s.peer = attributes.Uint32()
			}
		}
		if err := attributes.Err(); err != nil {
			return nil, err
		}
		out[binary.NativeEndian.Uint32(m.Data[4:])] = s
	}
	return out, nil
}
