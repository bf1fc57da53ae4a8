package inspect

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
)

// Connection is an open TCP connection.
type Connection struct {
	// PID and FD are of one of the processes that hold it.
	PID, FD       int
	Local, Remote netip.AddrPort
}

// closedStates are those of sockets without a connection, by the kernel's
// numbers (include/net/tcp_states.h): time wait, close, listen. A connection
// in time wait is no process's any more.
var closedStates = []uint64{6, 7, 10}

// Connections returns the connections of processes, each once.
func Connections(pids []int) ([]Connection, error) {
	holders := make(map[uint64]Connection)
	namespaces := make(map[string]int) // with one of the processes in each
	for _, pid := range pids {
		fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
		if err != nil {
			return nil, err
		}
		for _, path := range fds {
			link, err := os.Readlink(path)
			if err != nil {
				continue // closed or ended meanwhile
			}
			var inode uint64
			if n, _ := fmt.Sscanf(link, "socket:[%d]", &inode); n != 1 {
				continue
			}
			fd, err := strconv.Atoi(filepath.Base(path))
			if err != nil {
				return nil, err
			}
			if _, seen := holders[inode]; !seen {
				holders[inode] = Connection{PID: pid, FD: fd}
			}
		}
		if namespace, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", pid)); err == nil {
			namespaces[namespace] = pid
		}
	}
	var out []Connection
	for _, pid := range namespaces {
		for _, table := range []string{"tcp", "tcp6"} {
			f, err := os.Open(fmt.Sprintf("/proc/%d/net/%s", pid, table))
			if errors.Is(err, os.ErrNotExist) {
				continue // without IPv6, or ended meanwhile
			}
			if err != nil {
				return nil, err
			}
			found, err := parse(f, holders)
			if err = errors.Join(err, f.Close()); err != nil {
				return nil, fmt.Errorf("%s: %w", f.Name(), err)
			}
			out = append(out, found...)
		}
	}
	slices.SortFunc(out, func(a, b Connection) int {
		if a.PID != b.PID {
			return a.PID - b.PID
		}
		return a.FD - b.FD
	})
	return out, nil
}

// parse reads one of the kernel's tables (net/ipv4/tcp_ipv4.c, get_tcp4_sock)
// and completes the connections that somebody holds.
func parse(r io.Reader, holders map[uint64]Connection) ([]Connection, error) {
	var out []Connection
	s := bufio.NewScanner(r)
	s.Scan() // the head
	for s.Scan() {
		fields := strings.Fields(s.Text())
		if len(fields) < 10 {
			return nil, fmt.Errorf("line %q", s.Text())
		}
		inode, err := strconv.ParseUint(fields[9], 10, 64)
		if err != nil {
			return nil, fmt.Errorf("inode %q: %w", fields[9], err)
		}
		state, err := strconv.ParseUint(fields[3], 16, 8)
		if err != nil {
			return nil, fmt.Errorf("state %q: %w", fields[3], err)
		}
		c, held := holders[inode]
		if !held || inode == 0 || slices.Contains(closedStates, state) {
			continue
		}
		if c.Local, err = parseAddress(fields[1]); err != nil {
			return nil, err
		}
		if c.Remote, err = parseAddress(fields[2]); err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	return out, s.Err()
}

// parseAddress reads ADDRESS:PORT, where the address is hexadecimal words of
// 32 bits as they lie in memory. An IPv4 address in IPv6's clothes is one of
// IPv4, as it is on the wire.
func parseAddress(text string) (netip.AddrPort, error) {
	address, port, ok := strings.Cut(text, ":")
	raw, err := hex.DecodeString(address)
	number, perr := strconv.ParseUint(port, 16, 16)
	if err := errors.Join(err, perr); err != nil || !ok || len(raw)%4 != 0 {
		return netip.AddrPort{}, errors.Join(fmt.Errorf("address %q", text), err)
	}
	for i := 0; i < len(raw); i += 4 {
		binary.NativeEndian.PutUint32(raw[i:], binary.BigEndian.Uint32(raw[i:]))
	}
	ip, ok := netip.AddrFromSlice(raw)
	if !ok {
		return netip.AddrPort{}, fmt.Errorf("address %q", text)
	}
	return netip.AddrPortFrom(ip.Unmap(), uint16(number)), nil
}

// TCPConnections lists a container's open TCP connections, and refuses those
// that nobody has said anything about: a restore brings them back only to the
// same address, and only while their peers still have them.
func TCPConnections(pids []int, o *api.CheckpointOptions) ([]Connection, error) {
	list, err := Connections(pids)
	if err != nil {
		return nil, fmt.Errorf("TCP connections of the container: %w", err)
	}
	if len(list) == 0 || o.GetTcpEstablished() || o.GetTcpClose() {
		return list, nil
	}
	more := ""
	if len(list) > 1 {
		more = fmt.Sprintf(", and there are %d more", len(list)-1)
	}
	return nil, errclass.Precondition("the process %s has an open TCP connection from %s to %s%s: annotate the container with kata-checkpoint.dev/tcp: "+
		"established to keep connections or close to close them, have the engine send open_tcp, or close them before the checkpoint",
		named(list[0].PID), list[0].Local, list[0].Remote, more)
}
