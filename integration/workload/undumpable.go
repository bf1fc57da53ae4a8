// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"fmt"
	"io"
	"net"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ioUring counts and holds an io_uring, which no CRIU dumps.
type ioUring struct{ n int }

func (u *ioUring) open() error {
	var params [120]byte // struct io_uring_params
	const entries = 4
	if _, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, entries, uintptr(unsafe.Pointer(&params)), 0); errno != 0 {
		return os.NewSyscallError("io_uring_setup", errno)
	}
	return nil
}

func (u *ioUring) round(w io.Writer) error {
	u.n++
	_, err := fmt.Fprintf(w, "round %d\n", u.n)
	return err
}

// peer is one end of a connection on an abstract unix socket, which containers
// with a common network namespace share: it counts and sends each number to the
// other end, or receives it.
type peer struct {
	socket string
	listen bool

	n    int
	conn net.Conn
}

func (p *peer) connect() error {
	if !p.listen {
		var err error
		p.conn, err = net.Dial("unix", "@"+p.socket)
		return err
	}
	l, err := net.Listen("unix", "@"+p.socket)
	if err != nil {
		return err
	}
	fmt.Println("listening")
	if p.conn, err = l.Accept(); err != nil {
		return err
	}
	return l.Close()
}

func (p *peer) round(w io.Writer) error {
	p.n++
	n := []byte{byte(p.n)}
	if p.listen {
		if _, err := io.ReadFull(p.conn, n); err != nil {
			return err
		}
	} else if _, err := p.conn.Write(n); err != nil {
		return err
	}
	if n[0] != byte(p.n) {
		return fmt.Errorf("%d came in place of %d", n[0], byte(p.n))
	}
	_, err := fmt.Fprintf(w, "round %d\n", p.n)
	return err
}
