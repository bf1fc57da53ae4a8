// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
)

// loopback wraps a program with a TCP connection to a child process over the
// loopback interface, like that of a notebook server to its kernel. Each round
// is an exchange over it followed by the program's round. Another connection
// stays in the backlog of a listening socket that nobody accepts from.
type loopback struct {
	program
	caller caller
	stuck  net.Listener
}

// open starts the child process, which exits with the connection.
func (l *loopback) open() error {
	local := "127.0.0.1:0"
	var err error
	if l.stuck, err = net.Listen("tcp4", local); err != nil {
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
	echo, err := net.Listen("tcp4", local)
	if err != nil {
		return err
	}
	defer echo.Close()
	l.caller.address = echo.Addr().String()
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
	return l.caller.connect()
}

func (l *loopback) round(w io.Writer) error {
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
