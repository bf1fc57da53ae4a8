package inspect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/thread"
)

// Of the kernel's interface for unix sockets (linux/unix_diag.h).
const (
	udiagShowPeer    = 4 // UDIAG_SHOW_PEER
	unixDiagPeer     = 2 // UNIX_DIAG_PEER: the inode of the other end
	unixDiagReqSize  = 24
	unixDiagMsgSize  = 16
	unixDiagInode    = 4 // offset in struct unix_diag_msg
	netlinkAttrSize  = 4 // struct nlattr
	diagReceiveBytes = 64 << 10
)

// unixPeers maps the inode of each connected unix socket in a process's network
// namespace to that of its other end.
func unixPeers(pid int) (peers map[uint32]uint32, err error) {
	err = thread.Do(func() error {
		if err := thread.Enter(pid, "net"); err != nil {
			return err
		}
		peers, err = dumpUnixPeers()
		return err
	})
	return peers, err
}

func dumpUnixPeers() (map[uint32]uint32, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, fmt.Errorf("open sock_diag: %w", err)
	}
	defer unix.Close(fd)
	request := make([]byte, syscall.NLMSG_HDRLEN+unixDiagReqSize)
	order := binary.NativeEndian
	order.PutUint32(request, uint32(len(request))) //nolint:gosec // 40
	order.PutUint16(request[4:], unix.SOCK_DIAG_BY_FAMILY)
	order.PutUint16(request[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	body := request[syscall.NLMSG_HDRLEN:]
	body[0] = unix.AF_UNIX
	order.PutUint32(body[4:], ^uint32(0)) // in all states
	order.PutUint32(body[12:], udiagShowPeer)
	if err := unix.Sendto(fd, request, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, fmt.Errorf("ask sock_diag: %w", err)
	}
	peers := make(map[uint32]uint32)
	buffer := make([]byte, diagReceiveBytes)
	for {
		n, _, err := unix.Recvfrom(fd, buffer, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read sock_diag: %w", err)
		}
		done, err := readUnixPeers(buffer[:n], peers)
		if err != nil || done {
			return peers, err
		}
	}
}

// readUnixPeers takes the peers out of one answer and says whether it is the last.
func readUnixPeers(answer []byte, peers map[uint32]uint32) (done bool, err error) {
	messages, err := syscall.ParseNetlinkMessage(answer)
	if err != nil {
		return false, fmt.Errorf("read sock_diag: %w", err)
	}
	order := binary.NativeEndian
	for _, m := range messages {
		switch {
		case m.Header.Type == unix.NLMSG_DONE:
			return true, nil
		case m.Header.Type == unix.NLMSG_ERROR && len(m.Data) >= 4:
			return false, os.NewSyscallError("sock_diag", unix.Errno(-int32(order.Uint32(m.Data)))) //nolint:gosec // a negative errno
		case len(m.Data) < unixDiagMsgSize:
			continue
		}
		inode := order.Uint32(m.Data[unixDiagInode:])
		for attrs := m.Data[unixDiagMsgSize:]; len(attrs) >= netlinkAttrSize; {
			size, kind := int(order.Uint16(attrs)), order.Uint16(attrs[2:])
			if size < netlinkAttrSize || size > len(attrs) {
				break
			}
			if kind == unixDiagPeer && size >= netlinkAttrSize+4 {
				peers[inode] = order.Uint32(attrs[netlinkAttrSize:])
			}
			attrs = attrs[min((size+3)&^3, len(attrs)):]
		}
	}
	return false, nil
}
