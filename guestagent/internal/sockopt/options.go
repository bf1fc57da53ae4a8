// SPDX-License-Identifier: Apache-2.0

package sockopt

import (
	"errors"
	"net"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// option is one that any program may set, whose value is a number or, where it
// names an interface or an algorithm, a text.
type option struct {
	level, name int
	label       string
	format      format
}

type format int

const (
	number format = iota
	// iface is the index of a network interface, which another guest numbers
	// differently.
	iface
	// algorithm is the name of a congestion control.
	algorithm
)

// value is that of an option.
type value struct {
	number int
	text   string
}

// Of linux/tcp.h, which package unix lacks.
const tcpThinLinearTimeouts = 16

// options are those that CRIU does not restore and that somebody may miss. What
// the kernel changes on its own is not among them, such as TCP_QUICKACK and
// TCP_WINDOW_CLAMP, nor is what only a privileged program may set.
var options = []option{
	{unix.SOL_SOCKET, unix.SO_TIMESTAMP, "SO_TIMESTAMP", number},
	{unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, "SO_TIMESTAMPNS", number},
	{unix.SOL_SOCKET, unix.SO_TIMESTAMPING, "SO_TIMESTAMPING", number},
	{unix.SOL_SOCKET, unix.SO_RXQ_OVFL, "SO_RXQ_OVFL", number},
	{unix.SOL_SOCKET, unix.SO_SELECT_ERR_QUEUE, "SO_SELECT_ERR_QUEUE", number},
	{unix.SOL_SOCKET, unix.SO_MAX_PACING_RATE, "SO_MAX_PACING_RATE", number},
	{unix.SOL_SOCKET, unix.SO_ZEROCOPY, "SO_ZEROCOPY", number},

	{unix.SOL_TCP, unix.TCP_SYNCNT, "TCP_SYNCNT", number},
	{unix.SOL_TCP, unix.TCP_LINGER2, "TCP_LINGER2", number},
	{unix.SOL_TCP, unix.TCP_DEFER_ACCEPT, "TCP_DEFER_ACCEPT", number},
	{unix.SOL_TCP, unix.TCP_CONGESTION, "TCP_CONGESTION", algorithm},
	{unix.SOL_TCP, tcpThinLinearTimeouts, "TCP_THIN_LINEAR_TIMEOUTS", number},
	{unix.SOL_TCP, unix.TCP_USER_TIMEOUT, "TCP_USER_TIMEOUT", number},
	{unix.SOL_TCP, unix.TCP_FASTOPEN, "TCP_FASTOPEN", number},
	{unix.SOL_TCP, unix.TCP_NOTSENT_LOWAT, "TCP_NOTSENT_LOWAT", number},
	{unix.SOL_TCP, unix.TCP_SAVE_SYN, "TCP_SAVE_SYN", number},
	{unix.SOL_TCP, unix.TCP_INQ, "TCP_INQ", number},
	{unix.SOL_TCP, unix.TCP_TX_DELAY, "TCP_TX_DELAY", number},

	{unix.SOL_UDP, unix.UDP_NO_CHECK6_TX, "UDP_NO_CHECK6_TX", number},
	{unix.SOL_UDP, unix.UDP_NO_CHECK6_RX, "UDP_NO_CHECK6_RX", number},
	{unix.SOL_UDP, unix.UDP_SEGMENT, "UDP_SEGMENT", number},
	{unix.SOL_UDP, unix.UDP_GRO, "UDP_GRO", number},

	{unix.SOL_IP, unix.IP_RECVOPTS, "IP_RECVOPTS", number},
	{unix.SOL_IP, unix.IP_RETOPTS, "IP_RETOPTS", number},
	{unix.SOL_IP, unix.IP_PKTINFO, "IP_PKTINFO", number},
	{unix.SOL_IP, unix.IP_MTU_DISCOVER, "IP_MTU_DISCOVER", number},
	{unix.SOL_IP, unix.IP_RECVERR, "IP_RECVERR", number},
	{unix.SOL_IP, unix.IP_RECVTTL, "IP_RECVTTL", number},
	{unix.SOL_IP, unix.IP_RECVTOS, "IP_RECVTOS", number},
	{unix.SOL_IP, unix.IP_RECVORIGDSTADDR, "IP_RECVORIGDSTADDR", number},
	{unix.SOL_IP, unix.IP_MINTTL, "IP_MINTTL", number},
	{unix.SOL_IP, unix.IP_CHECKSUM, "IP_CHECKSUM", number},
	{unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, "IP_BIND_ADDRESS_NO_PORT", number},
	{unix.SOL_IP, unix.IP_RECVFRAGSIZE, "IP_RECVFRAGSIZE", number},
	{unix.SOL_IP, unix.IP_RECVERR_RFC4884, "IP_RECVERR_RFC4884", number},
	{unix.SOL_IP, unix.IP_MULTICAST_TTL, "IP_MULTICAST_TTL", number},
	{unix.SOL_IP, unix.IP_MULTICAST_LOOP, "IP_MULTICAST_LOOP", number},
	{unix.SOL_IP, unix.IP_MULTICAST_ALL, "IP_MULTICAST_ALL", number},

	{unix.SOL_IPV6, unix.IPV6_UNICAST_HOPS, "IPV6_UNICAST_HOPS", number},
	{unix.SOL_IPV6, unix.IPV6_MULTICAST_IF, "IPV6_MULTICAST_IF", iface},
	{unix.SOL_IPV6, unix.IPV6_MULTICAST_HOPS, "IPV6_MULTICAST_HOPS", number},
	{unix.SOL_IPV6, unix.IPV6_MULTICAST_LOOP, "IPV6_MULTICAST_LOOP", number},
	{unix.SOL_IPV6, unix.IPV6_MULTICAST_ALL, "IPV6_MULTICAST_ALL", number},
	{unix.SOL_IPV6, unix.IPV6_MTU_DISCOVER, "IPV6_MTU_DISCOVER", number},
	{unix.SOL_IPV6, unix.IPV6_RECVERR, "IPV6_RECVERR", number},
	{unix.SOL_IPV6, unix.IPV6_RECVERR_RFC4884, "IPV6_RECVERR_RFC4884", number},
	{unix.SOL_IPV6, unix.IPV6_RECVPKTINFO, "IPV6_RECVPKTINFO", number},
	{unix.SOL_IPV6, unix.IPV6_RECVHOPLIMIT, "IPV6_RECVHOPLIMIT", number},
	{unix.SOL_IPV6, unix.IPV6_RECVPATHMTU, "IPV6_RECVPATHMTU", number},
	{unix.SOL_IPV6, unix.IPV6_DONTFRAG, "IPV6_DONTFRAG", number},
	{unix.SOL_IPV6, unix.IPV6_RECVTCLASS, "IPV6_RECVTCLASS", number},
	{unix.SOL_IPV6, unix.IPV6_TCLASS, "IPV6_TCLASS", number},
	{unix.SOL_IPV6, unix.IPV6_AUTOFLOWLABEL, "IPV6_AUTOFLOWLABEL", number},
	{unix.SOL_IPV6, unix.IPV6_ADDR_PREFERENCES, "IPV6_ADDR_PREFERENCES", number},
	{unix.SOL_IPV6, unix.IPV6_MINHOPCOUNT, "IPV6_MINHOPCOUNT", number},
	{unix.SOL_IPV6, unix.IPV6_RECVORIGDSTADDR, "IPV6_RECVORIGDSTADDR", number},
	{unix.SOL_IPV6, unix.IPV6_RECVFRAGSIZE, "IPV6_RECVFRAGSIZE", number},
}

func find(level, name int) (option, bool) {
	i := slices.IndexFunc(options, func(o option) bool { return o.level == level && o.name == name })
	if i < 0 {
		return option{}, false
	}
	return options[i], true
}

// values are those of all options that a socket has.
func values(fd int) map[option]value {
	out := make(map[option]value, len(options))
	for _, o := range options {
		if v, ok := o.get(fd); ok {
			out[o] = v
		}
	}
	return out
}

// get returns the value of an option, unless a socket does not have it.
func (o option) get(fd int) (v value, ok bool) {
	if o.format == algorithm {
		text, err := unix.GetsockoptString(fd, o.level, o.name)
		return value{text: text}, err == nil
	}
	n, err := unix.GetsockoptInt(fd, o.level, o.name)
	if err != nil {
		return v, false
	}
	if o.format == iface && n != 0 {
		i, err := net.InterfaceByIndex(n)
		if err != nil {
			return v, false // it is gone, and the option does nothing
		}
		return value{text: i.Name}, true
	}
	return value{number: n}, true
}

// allowedAlgorithms are what unprivileged programs may choose.
const allowedAlgorithms = "/proc/sys/net/ipv4/tcp_allowed_congestion_control"

func (o option) set(fd int, v value) error {
	n := v.number
	switch {
	case o.format == algorithm:
		allowed, err := os.ReadFile(allowedAlgorithms)
		if err != nil {
			return err
		}
		if !slices.Contains(strings.Fields(string(allowed)), v.text) {
			return errors.New(allowedAlgorithms + " of this guest does not have " + v.text)
		}
		return os.NewSyscallError("setsockopt", unix.SetsockoptString(fd, o.level, o.name, v.text))
	case o.format == iface && v.text != "":
		i, err := net.InterfaceByName(v.text)
		if err != nil {
			return err
		}
		n = i.Index
	}
	return os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, o.level, o.name, n))
}
