package netlock

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// batch is messages to nf_tables that take effect together or not at all
// (net/netfilter/nfnetlink.c, nfnetlink_rcv_batch).
type batch struct {
	data []byte
	last int // where the last message begins
}

func newBatch() *batch {
	b := &batch{}
	b.message(unix.NFNL_MSG_BATCH_BEGIN, 0, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES)
	return b
}

func (b *batch) add(kind, flags uint16, attributes ...[]byte) {
	b.message(unix.NFNL_SUBSYS_NFTABLES<<8|kind, flags, unix.NFPROTO_INET, 0, attributes...)
}

// message appends one: struct nlmsghdr, struct nfgenmsg, attributes.
func (b *batch) message(kind, flags uint16, family byte, resource uint16, attributes ...[]byte) {
	b.last = len(b.data)
	b.data = binary.NativeEndian.AppendUint32(b.data, 0)
	b.data = binary.NativeEndian.AppendUint16(b.data, kind)
	b.data = binary.NativeEndian.AppendUint16(b.data, unix.NLM_F_REQUEST|flags)
	b.data = append(b.data, make([]byte, 8)...) // sequence and port: one batch, one answer
	b.data = append(b.data, family, unix.NFNETLINK_V0)
	b.data = binary.BigEndian.AppendUint16(b.data, resource)
	for _, a := range attributes {
		b.data = append(b.data, a...)
	}
	binary.NativeEndian.PutUint32(b.data[b.last:], uint32(len(b.data)-b.last)) //nolint:gosec // a message
}

// answerTimeout bounds the wait for the kernel, which answers while it takes a batch, in seconds.
const answerTimeout = 10

// send hands the batch to the kernel and returns its first error.
func (b *batch) send() error {
	// An answer is asked for to the last message only. To one that fails there is one in any case.
	flags := b.data[b.last+6:]
	binary.NativeEndian.PutUint16(flags, binary.NativeEndian.Uint16(flags)|unix.NLM_F_ACK)
	b.message(unix.NFNL_MSG_BATCH_END, 0, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES)
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 2*len(b.data)); err != nil {
		return os.NewSyscallError("setsockopt", err)
	}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: answerTimeout}); err != nil {
		return os.NewSyscallError("setsockopt", err)
	}
	if err := unix.Sendto(fd, b.data, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return os.NewSyscallError("sendto", err)
	}
	answer := make([]byte, os.Getpagesize())
	n, _, err := unix.Recvfrom(fd, answer, 0)
	if err != nil {
		return os.NewSyscallError("recvfrom", err)
	}
	// struct nlmsghdr with the type NLMSG_ERROR, then the error number, negative.
	if n < unix.NLMSG_HDRLEN+4 || binary.NativeEndian.Uint16(answer[4:]) != unix.NLMSG_ERROR {
		return errors.New("the kernel's answer is no answer")
	}
	if number := int32(binary.NativeEndian.Uint32(answer[unix.NLMSG_HDRLEN:])); number != 0 { //nolint:gosec // an error number
		return unix.Errno(-number) //nolint:gosec // an error number
	}
	return nil
}

// attribute is struct nlattr with its value, padded.
func attribute(kind uint16, values ...[]byte) []byte {
	out := make([]byte, 4)
	for _, v := range values {
		out = append(out, v...)
	}
	binary.NativeEndian.PutUint16(out, uint16(len(out))) //nolint:gosec // bounded by what is in this file
	binary.NativeEndian.PutUint16(out[2:], kind)
	for len(out)%unix.NLMSG_ALIGNTO != 0 {
		out = append(out, 0)
	}
	return out
}

func nested(kind uint16, attributes ...[]byte) []byte {
	return attribute(kind|unix.NLA_F_NESTED, attributes...)
}

func text(kind uint16, s string) []byte { return attribute(kind, append([]byte(s), 0)) }

func number(kind uint16, n uint32) []byte {
	return attribute(kind, binary.BigEndian.AppendUint32(nil, n))
}

// dropPackets is a rule: TCP from here to there is dropped.
func dropPackets(from, to netip.AddrPort) [][]byte {
	protocol, source, destination, length := byte(unix.NFPROTO_IPV4), uint32(12), uint32(16), uint32(4)
	if from.Addr().Is6() {
		protocol, source, destination, length = unix.NFPROTO_IPV6, 8, 24, 16
	}
	ports := binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, from.Port()), to.Port())
	return [][]byte{
		meta(unix.NFT_META_NFPROTO), equal([]byte{protocol}),
		meta(unix.NFT_META_L4PROTO), equal([]byte{unix.IPPROTO_TCP}),
		payload(unix.NFT_PAYLOAD_NETWORK_HEADER, source, length), equal(from.Addr().AsSlice()),
		payload(unix.NFT_PAYLOAD_NETWORK_HEADER, destination, length), equal(to.Addr().AsSlice()),
		payload(unix.NFT_PAYLOAD_TRANSPORT_HEADER, 0, 4), equal(ports),
		expression("immediate", number(unix.NFTA_IMMEDIATE_DREG, unix.NFT_REG_VERDICT),
			nested(unix.NFTA_IMMEDIATE_DATA, nested(unix.NFTA_DATA_VERDICT, number(unix.NFTA_VERDICT_CODE, 0 /* NF_DROP */)))),
	}
}

func expression(name string, attributes ...[]byte) []byte {
	return nested(unix.NFTA_LIST_ELEM, text(unix.NFTA_EXPR_NAME, name), nested(unix.NFTA_EXPR_DATA, attributes...))
}

// meta loads what the kernel knows of a packet.
func meta(key uint32) []byte {
	return expression("meta", number(unix.NFTA_META_DREG, unix.NFT_REG_1), number(unix.NFTA_META_KEY, key))
}

// payload loads a part of one of a packet's headers.
func payload(header, offset, length uint32) []byte {
	return expression("payload", number(unix.NFTA_PAYLOAD_DREG, unix.NFT_REG_1), number(unix.NFTA_PAYLOAD_BASE, header),
		number(unix.NFTA_PAYLOAD_OFFSET, offset), number(unix.NFTA_PAYLOAD_LEN, length))
}

// equal goes on with the rule only if what was loaded last is this.
func equal(value []byte) []byte {
	return expression("cmp", number(unix.NFTA_CMP_SREG, unix.NFT_REG_1), number(unix.NFTA_CMP_OP, unix.NFT_CMP_EQ),
		nested(unix.NFTA_CMP_DATA, attribute(unix.NFTA_DATA_VALUE, value)))
}
