// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// loopback wraps a program with TCP connections to child processes over the
// loopback interface, like those of a notebook server to its kernels. Each round
// is an exchange over one of them followed by the program's round; the other one is
// in use all the time. A third connection stays in the backlog of a listening
// socket that nobody accepts from, more are half closed, and nothing is ever said
// over the last one, whose ends soon give up a peer that does not answer.
type loopback struct {
	program
	caller, busy caller
	failed       atomic.Pointer[error] // of the busy one
	half         halfClosed
	stuck        net.Listener
	silent       [2]*net.TCPConn
}

// impatient is the keepalive of the silent connection. It is given up after two
// seconds, which no checkpoint and no restore may take from it.
var impatient = net.KeepAliveConfig{Enable: true, Idle: time.Second, Interval: time.Second, Count: 1}

// busyPause is between two exchanges over the busy connection.
const busyPause = 5 * time.Millisecond

// open starts the child processes, which exit with their connections.
func (l *loopback) open() error {
	var err error
	if l.stuck, err = net.Listen("tcp4", anyLoopback); err != nil {
		return err
	}
	waiting, err := net.Dial("tcp4", l.stuck.Addr().String())
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintln(waiting, "a probe, which has hung up"); err != nil {
		return err
	}
	if err := waiting.Close(); err != nil {
		return err
	}
	for _, c := range []*caller{&l.caller, &l.busy} {
		if err := c.connectToChild(); err != nil {
			return err
		}
	}
	if err := l.half.open(); err != nil {
		return err
	}
	if err := l.openSilent(); err != nil {
		return err
	}
	go func() {
		for ticker := time.NewTicker(busyPause); ; <-ticker.C {
			if err := l.busy.exchange(); err != nil {
				l.failed.Store(&err)
				return
			}
		}
	}()
	return nil
}

// openSilent makes a connection of the process to itself.
func (l *loopback) openSilent() error {
	listener, err := net.Listen("tcp4", anyLoopback)
	if err != nil {
		return err
	}
	defer listener.Close()
	here, err := net.Dial("tcp4", listener.Addr().String())
	if err != nil {
		return err
	}
	there, err := listener.Accept()
	if err != nil {
		return err
	}
	for i, c := range []net.Conn{here, there} {
		l.silent[i] = c.(*net.TCPConn)
		if err := l.silent[i].SetKeepAliveConfig(impatient); err != nil {
			return err
		}
	}
	return nil
}

// checkSilent checks that neither end has been given up, and that both still
// send probes.
func (l *loopback) checkSilent() error {
	for _, c := range l.silent {
		raw, err := c.SyscallConn()
		if err != nil {
			return err
		}
		var failed error
		err = raw.Control(func(fd uintptr) {
			on, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_KEEPALIVE)
			if err == nil && on == 0 {
				err = errors.New("SO_KEEPALIVE is off")
			}
			n, _, rerr := unix.Recvfrom(int(fd), make([]byte, 1), unix.MSG_PEEK|unix.MSG_DONTWAIT)
			if rerr == nil {
				rerr = fmt.Errorf("%d bytes are there", n)
			}
			if !errors.Is(rerr, unix.EAGAIN) {
				err = errors.Join(err, rerr)
			}
			failed = err
		})
		if err := errors.Join(err, failed); err != nil {
			return fmt.Errorf("silent connection from %s to %s: %w", c.LocalAddr(), c.RemoteAddr(), err)
		}
	}
	return nil
}

const anyLoopback = "127.0.0.1:0"

// connectToChild starts a child process and connects to it.
func (c *caller) connectToChild() error {
	echo, err := net.Listen("tcp4", anyLoopback)
	if err != nil {
		return err
	}
	defer echo.Close()
	c.address = echo.Addr().String()
	f, err := echo.(*net.TCPListener).File()
	if err != nil {
		return err
	}
	defer f.Close()
	child := exec.Command("/proc/self/exe", "echo")
	child.Stderr, child.ExtraFiles = os.Stderr, []*os.File{f}
	if err := child.Start(); err != nil {
		return err
	}
	// A connection that is given up would be the one that the child accepts.
	conn, err := net.Dial("tcp4", c.address)
	if err != nil {
		return err
	}
	c.conn, c.answers = conn, bufio.NewReader(conn)
	return nil
}

func (l *loopback) round(w io.Writer) error {
	if err := l.failed.Load(); err != nil {
		return fmt.Errorf("loopback, all the time: %w", *err)
	}
	if err := l.half.check(); err != nil {
		return err
	}
	if err := l.checkSilent(); err != nil {
		return err
	}
	if err := l.caller.exchange(); err != nil {
		return fmt.Errorf("loopback: %w", err)
	}
	return l.program.round(w)
}

// echoOnce serves one connection to the listening socket that it inherited.
func echoOnce() error {
	l, err := net.FileListener(os.NewFile(3, "listener"))
	if err != nil {
		return err
	}
	c, err := l.Accept()
	if err != nil {
		return err
	}
	echoLines(c)
	return nil
}

// echoLines sends every line back until the connection ends.
func echoLines(c net.Conn) {
	for lines := bufio.NewReader(c); ; {
		line, err := lines.ReadString('\n')
		if err != nil {
			return
		}
		if _, err := io.WriteString(c, line); err != nil {
			return
		}
	}
}
