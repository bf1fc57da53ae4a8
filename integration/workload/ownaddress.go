// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Ports of the program own-address at the container's own address.
const (
	OwnAddressTCP = 8080 // a relay
	OwnAddressUDP = 8081 // answers every datagram with "heard " and its content
)

// Bound precedes the addresses of the program's sockets, which it prints whenever
// one has changed.
const Bound = "bound"

// ownAddress has sockets that are bound to the container's own address: a
// client that is connected to a UDP server, a TCP listener, a UDP server, and a
// TCP connection of the program to itself.
type ownAddress struct {
	server string

	client   net.Conn
	listener relay
	served   *net.UDPConn
	failed   atomic.Pointer[error]
	caller   caller
	accepted net.Conn
	sockets  []syscall.Conn
	count    int
	bound    string
}

func (o *ownAddress) open() (err error) {
	if o.client, err = net.Dial("udp4", o.server); err != nil {
		return err
	}
	own := o.client.LocalAddr().(*net.UDPAddr).IP
	listener, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: own, Port: OwnAddressTCP})
	if err != nil {
		return err
	}
	o.listener.serveAll(listener)
	if o.served, err = net.ListenUDP("udp4", &net.UDPAddr{IP: own, Port: OwnAddressUDP}); err != nil {
		return err
	}
	go o.answer()

	itself, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: own})
	if err != nil {
		return err
	}
	defer itself.Close()
	o.caller.address = itself.Addr().String()
	if err := o.caller.connect(); err != nil {
		return err
	}
	if o.accepted, err = itself.Accept(); err != nil {
		return err
	}
	go echoLines(o.accepted)
	o.sockets = []syscall.Conn{o.client.(*net.UDPConn), listener, o.served, o.caller.conn.(*net.TCPConn), o.accepted.(*net.TCPConn)}
	return nil
}

func (o *ownAddress) answer() {
	buf := make([]byte, 1500)
	for {
		n, from, err := o.served.ReadFromUDPAddrPort(buf)
		if err == nil {
			_, err = o.served.WriteToUDPAddrPort(append([]byte("heard "), buf[:n]...), from)
		}
		if err != nil {
			o.failed.Store(&err)
			return
		}
	}
}

func (o *ownAddress) round(w io.Writer) error {
	if err := o.failed.Load(); err != nil {
		return fmt.Errorf("UDP server: %w", *err)
	}
	if err := o.listener.round(w); err != nil {
		return fmt.Errorf("TCP listener: %w", err)
	}
	if err := o.caller.exchange(); err != nil {
		return fmt.Errorf("connection to itself: %w", err)
	}
	bound := make([]string, 0, len(o.sockets))
	for _, s := range o.sockets {
		address, err := boundAddress(s)
		if err != nil {
			return err
		}
		bound = append(bound, address)
	}
	if now := strings.Join(bound, " "); now != o.bound {
		o.bound = now
		if _, err := fmt.Fprintln(w, Bound, now); err != nil {
			return err
		}
	}
	o.count++
	got, err := Exchange(o.client, strconv.Itoa(o.count))
	if err != nil {
		return fmt.Errorf("UDP client: %w", err)
	}
	if got != strconv.Itoa(o.count) {
		return fmt.Errorf("UDP client: the answer to %d is %q", o.count, got)
	}
	_, err = fmt.Fprintln(w, "round", o.count)
	return err
}

// boundAddress asks the kernel: the address that package net has is that of the
// time when the socket was made.
func boundAddress(s syscall.Conn) (string, error) {
	raw, err := s.SyscallConn()
	if err != nil {
		return "", err
	}
	var name unix.Sockaddr
	var failed error
	if err := raw.Control(func(fd uintptr) { name, failed = unix.Getsockname(int(fd)) }); err != nil {
		return "", err
	}
	if failed != nil {
		return "", failed
	}
	a, ok := name.(*unix.SockaddrInet4)
	if !ok {
		return "", fmt.Errorf("a socket has the address %v", name)
	}
	return netip.AddrFrom4(a.Addr).String(), nil
}

// Exchange sends a datagram and returns the answer. As datagrams may be lost, it
// sends it again for up to a minute, and so answers to earlier ones may still
// come: they are skipped if they do not end like the question.
func Exchange(c net.Conn, question string) (string, error) {
	const attempts, patience = 60, time.Second
	buf := make([]byte, 1500)
	for range attempts {
		if _, err := io.WriteString(c, question); err != nil && !errors.Is(err, unix.ECONNREFUSED) { // the answer to an earlier one
			return "", err
		}
		if err := c.SetReadDeadline(time.Now().Add(patience)); err != nil {
			return "", err
		}
		for {
			n, err := c.Read(buf)
			if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, unix.ECONNREFUSED) {
				break
			}
			if err != nil {
				return "", err
			}
			if answer := string(buf[:n]); strings.HasSuffix(answer, question) {
				return answer, nil
			}
		}
	}
	return "", fmt.Errorf("%s does not answer %q", c.RemoteAddr(), question)
}
