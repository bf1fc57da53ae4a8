// SPDX-License-Identifier: Apache-2.0

package inspect

import (
	"fmt"
	"math/bits"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/pidfd"
)

// families is the table of socket families: what CRIU 4.2 has a dump_ops for
// (criu/sockets.c, dump_socket), and what programs in containers are known to
// use besides. In Kata a container can have vsock sockets: the guest has them.
var families = map[int]rule{
	unix.AF_UNIX:      {},
	unix.AF_INET:      {},
	unix.AF_INET6:     {},
	unix.AF_PACKET:    {},
	unix.AF_NETLINK:   {},
	unix.AF_VSOCK:     unsupportedSocket("vsock (AF_VSOCK)"),
	unix.AF_ALG:       unsupportedSocket("kernel crypto (AF_ALG)"),
	unix.AF_CAN:       unsupportedSocket("CAN (AF_CAN)"),
	unix.AF_XDP:       unsupportedSocket("XDP (AF_XDP)"),
	unix.AF_TIPC:      unsupportedSocket("TIPC (AF_TIPC)"),
	unix.AF_RDS:       unsupportedSocket("RDS (AF_RDS)"),
	unix.AF_BLUETOOTH: unsupportedSocket("Bluetooth (AF_BLUETOOTH)"),
}

// protocols is the table of those of AF_INET and AF_INET6 (criu/sk-inet.c,
// can_dump_ipproto). Raw sockets may have any.
var protocols = map[int]rule{
	unix.IPPROTO_IP:      {},
	unix.IPPROTO_TCP:     {},
	unix.IPPROTO_UDP:     {},
	unix.IPPROTO_UDPLITE: {},
	unix.IPPROTO_ICMP:    {},
	unix.IPPROTO_ICMPV6:  {},
	unix.IPPROTO_MPTCP:   unsupportedSocket("MPTCP"),
	unix.IPPROTO_SCTP:    unsupportedSocket("SCTP"),
	unix.IPPROTO_DCCP:    unsupportedSocket("DCCP"),
	unix.IPPROTO_L2TP:    unsupportedSocket("L2TP"),
}

func unsupportedSocket(kind string) rule {
	return rule{Refused, errcode.SocketKind, "has a socket of the kind " + kind + " open, which CRIU cannot checkpoint", "close it before the checkpoint, or run the program without it"}
}

// maxNetlinkGroups is how many multicast groups of a netlink socket CRIU can
// restore (criu/sk-netlink.c).
const maxNetlinkGroups = 32

// unusualSockets finds sockets by what they are, which only the socket itself
// tells: each is looked at through a copy of its descriptor.
func (c *Container) unusualSockets(o *api.CheckpointOptions) (findings []Finding) {
	byProcess := make(map[*Process][]int)
	unread := make(map[owner]bool)
	for number, o := range c.sockets.owners {
		byProcess[o.process] = append(byProcess[o.process], o.fd)
		if c.sockets.unix[number].unread {
			unread[o] = true
		}
	}
	for _, p := range c.Processes {
		fds := byProcess[p]
		if len(fds) == 0 {
			continue
		}
		process, err := pidfd.Open(p.PID)
		if err != nil {
			continue // exited meanwhile
		}
		slices.Sort(fds)
		var bound []netip.AddrPort
		var made []string
		for _, fd := range fds {
			r, local, index := classifySocket(process, fd, unread[owner{p, fd}])
			if name := c.made[index]; name != "" {
				made = append(made, name)
			}
			if r.class != Good {
				findings = append(findings, c.finding(p, r))
			} else if local.IsValid() {
				bound = append(bound, local)
			}
		}
		unix.Close(process)
		for _, conn := range c.Connections {
			if conn.PID == p.PID && conn.Inside && !o.GetTcpClose() {
				bound = append(bound, conn.Local)
			}
		}
		findings = append(findings, c.ownAddress(p, bound, o.GetAddressStays())...)
		findings = append(findings, c.onMadeInterface(p, made, o.GetAddressStays())...)
	}
	return findings
}

// classifySocket finds the rule for a socket that a process has open, the address
// that it is bound to, should a restore bind it again, and the index of the
// interface that it is bound to, or 0. Of a unix socket it is known whether there
// is something to read.
func classifySocket(process, fd int, unread bool) (r rule, local netip.AddrPort, index int) {
	socket, err := unix.PidfdGetfd(process, fd, 0)
	if err != nil {
		return r, local, 0 // closed or exited meanwhile
	}
	defer unix.Close(socket)
	var option [3]int
	for i, name := range []int{unix.SO_DOMAIN, unix.SO_TYPE, unix.SO_PROTOCOL} {
		if option[i], err = unix.GetsockoptInt(socket, unix.SOL_SOCKET, name); err != nil {
			return r, local, 0 // another file has the number by now
		}
	}
	domain, kind, protocol := option[0], option[1], option[2]
	r, known := families[domain]
	if domain == unix.AF_PACKET || domain == unix.AF_INET || domain == unix.AF_INET6 {
		index = boundInterface(socket, domain)
	}
	switch {
	case !known:
		r = rule{class: Unknown, what: fmt.Sprintf("has a socket of the address family %d open, which this version does not know", domain)}
	case domain == unix.AF_NETLINK && netlinkGroups(socket) > maxNetlinkGroups:
		r = rule{Refused, errcode.NetlinkGroups, fmt.Sprintf("listens on netlink multicast groups beyond the first %d, which CRIU cannot checkpoint", maxNetlinkGroups), "terminate it before the checkpoint"}
	case domain == unix.AF_NETLINK && hasUnread(socket):
		r = rule{Refused, errcode.SocketBusy, "has a netlink socket with messages that it has not read, which CRIU cannot checkpoint", readFirst}
	case domain == unix.AF_UNIX && unread:
		r = unreadMessages(socket)
	case domain == unix.AF_INET, domain == unix.AF_INET6:
		var anywhere bool
		if local, anywhere = boundTo(socket, kind); anywhere {
			local = netip.AddrPort{}
		}
		if kind == unix.SOCK_RAW {
			break
		}
		if r, known = protocols[protocol]; !known {
			r = unsupportedSocket(fmt.Sprintf("IP protocol %d", protocol))
		}
		if isUDP := protocol == unix.IPPROTO_UDP || protocol == unix.IPPROTO_UDPLITE; isUDP && corked(socket) {
			r = rule{Refused, errcode.SocketBusy, "has a UDP socket that collects what it is to send (UDP_CORK), which CRIU cannot checkpoint", "repeat the checkpoint once it has sent that"}
		}
		if r.class == Good && protocol == unix.IPPROTO_TCP {
			r = upperProtocol(unix.GetsockoptString(socket, unix.SOL_TCP, unix.TCP_ULP))
		}
	}
	return r, local, index
}

// upperProtocol is the rule for a TCP socket with a protocol of the kernel's above
// TCP, such as TLS, by the name that getsockopt has returned. CRIU restores the
// connection without it: what the program then writes would be sent as it is.
func upperProtocol(name string, err error) rule {
	if err != nil || name == "" {
		return rule{}
	}
	return unsupportedSocket(fmt.Sprintf("TCP with %q in the kernel (TCP_ULP)", name))
}

// corked reports whether UDP_CORK is set (linux/udp.h).
func corked(socket int) bool {
	const udpCork = 1
	set, err := unix.GetsockoptInt(socket, unix.SOL_UDP, udpCork)
	return err == nil && set != 0
}

// netlinkGroups is the highest multicast group that a netlink socket is a
// member of, as far as the first 64 go: no protocol of the kernel has more.
func netlinkGroups(socket int) int {
	members, err := unix.GetsockoptUint64(socket, unix.SOL_NETLINK, unix.NETLINK_LIST_MEMBERSHIPS)
	if err != nil {
		return 0
	}
	return bits.Len64(members)
}
