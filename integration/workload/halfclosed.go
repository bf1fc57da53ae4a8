// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// halfClosed is TCP connections to a child process over the loopback interface of
// which one direction is closed, by IPv4, IPv6 and with IPv4 at one end only. The
// other direction is always full of data that is verified as it arrives, so that
// each end has something to send. In half of them it is closed as well, behind
// that data.
type halfClosed struct {
	failed atomic.Pointer[error]
}

// halfClosedEach is how many connections there are of each kind.
const halfClosedEach = 4

// halfClosedFamilies are the listening sockets, each with what dials it.
var halfClosedFamilies = []struct{ network, address, dial, host string }{
	{"tcp4", anyLoopback, "tcp4", "127.0.0.1"},
	{"tcp6", "[::1]:0", "tcp6", "::1"},
	{"tcp", "[::]:0", "tcp4", "127.0.0.1"}, // accepts mapped addresses
}

// A connection begins with one of these bytes.
const (
	childSends    = 'c'
	childReceives = 'p'
)

const (
	// lastWords are what a direction has before its end. Nobody reads them.
	lastWords = "nothing else follows"
	// halfClosedBuffer is the size in bytes of a socket's buffers, about.
	halfClosedBuffer = 16 << 10
	// halfClosedPause is between two lines that are read.
	halfClosedPause = 20 * time.Millisecond
	// halfClosedLine is the length of a line, about.
	halfClosedLine = 500
)

// open makes the connections to a child process, which exits with an error when a
// check of its own fails.
func (h *halfClosed) open() error {
	child := exec.Command("/proc/self/exe", "half-closed")
	child.Stderr = os.Stderr
	var addresses []string
	for _, f := range halfClosedFamilies {
		l, err := net.Listen(f.network, f.address)
		if err != nil {
			return err
		}
		defer l.Close()
		file, err := l.(*net.TCPListener).File()
		if err != nil {
			return err
		}
		defer file.Close()
		child.ExtraFiles = append(child.ExtraFiles, file)
		addresses = append(addresses, net.JoinHostPort(f.host, strconv.Itoa(l.Addr().(*net.TCPAddr).Port)))
	}
	if err := child.Start(); err != nil {
		return err
	}
	go h.fail(func() error { return fmt.Errorf("the child process has exited: %w", errors.Join(child.Wait(), io.EOF)) })
	for i, address := range addresses {
		for n := range halfClosedEach {
			c, err := net.Dial(halfClosedFamilies[i].dial, address)
			if err != nil {
				return err
			}
			role := byte(childReceives)
			if n%2 == 0 {
				role = childSends
			}
			if _, err := c.Write([]byte{role}); err != nil {
				return err
			}
			go h.fail(func() error { return halfClosedEnd(c.(*net.TCPConn), role == childReceives, n >= halfClosedEach/2) })
		}
	}
	return nil
}

// fail notes how something has ended that should not.
func (h *halfClosed) fail(run func() error) {
	err := fmt.Errorf("half-closed connections: %w", run())
	h.failed.CompareAndSwap(nil, &err)
}

func (h *halfClosed) check() error {
	if err := h.failed.Load(); err != nil {
		return *err
	}
	return nil
}

// halfClosedChild is the child process. It inherits the listening sockets.
func halfClosedChild() error {
	ended := make(chan error)
	for i := range halfClosedFamilies {
		l, err := net.FileListener(os.NewFile(uintptr(3+i), "listener"))
		if err != nil {
			return err
		}
		for n := range halfClosedEach {
			c, err := l.Accept()
			if err != nil {
				return err
			}
			var role [1]byte
			if _, err := io.ReadFull(c, role[:]); err != nil {
				return err
			}
			go func() { ended <- halfClosedEnd(c.(*net.TCPConn), role[0] == childSends, n >= halfClosedEach/2) }()
		}
		if err := l.Close(); err != nil {
			return err
		}
	}
	return <-ended
}

// halfClosedEnd serves one end of a connection until a check fails.
func halfClosedEnd(c *net.TCPConn, sends, last bool) error {
	err := errors.Join(c.SetReadBuffer(halfClosedBuffer), c.SetWriteBuffer(halfClosedBuffer))
	if err != nil {
		return err
	}
	switch {
	case sends && last:
		err = sendLast(c)
	case sends:
		err = sendOn(c)
	default:
		err = receive(c, last)
	}
	return fmt.Errorf("from %s to %s: %w", c.LocalAddr(), c.RemoteAddr(), err)
}

func halfClosedText(n int) string { return fmt.Sprintf("%0*d\n", halfClosedLine, n) }

// sendOn sends numbered lines as fast as they are taken, and checks that what the
// other end has said before it closed its direction is still there.
func sendOn(c *net.TCPConn) error {
	for n := 1; ; n++ {
		if err := peekLastWords(c); err != nil {
			return err
		}
		if _, err := io.WriteString(c, halfClosedText(n)); err != nil {
			return err
		}
	}
}

// sendLast sends what fits into the buffers, closes its direction as well, and
// checks that the connection remains.
func sendLast(c *net.TCPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	if err := peekLastWords(c); err != nil {
		return err
	}
	text := []byte(strings.Repeat(lastWords, 1<<20/len(lastWords)))
	var failed error
	err = raw.Write(func(fd uintptr) bool {
		for len(text) > 0 {
			n, err := unix.Write(int(fd), text)
			if errors.Is(err, unix.EAGAIN) {
				break
			}
			if err != nil {
				failed = err
				break
			}
			text = text[n:]
		}
		return true
	})
	if err := errors.Join(err, failed, c.CloseWrite()); err != nil {
		return err
	}
	for ticker := time.NewTicker(halfClosedPause); ; <-ticker.C {
		if err := peekLastWords(c); err != nil {
			return err
		}
	}
}

// receive closes its direction and verifies what the other end sends: numbered
// lines, or the last words again and again, so slowly that there are always some
// left.
func receive(c *net.TCPConn, last bool) error {
	if _, err := io.WriteString(c, lastWords); err != nil {
		return err
	}
	if err := c.CloseWrite(); err != nil {
		return err
	}
	ticker := time.NewTicker(halfClosedPause)
	for n := 1; ; n++ {
		<-ticker.C
		want := halfClosedText(n)
		if last {
			want = lastWords[(n-1)%len(lastWords):][:1]
		}
		have := make([]byte, len(want))
		if _, err := io.ReadFull(c, have); err != nil {
			return fmt.Errorf("part %d: %w", n, err)
		}
		if string(have) != want {
			return fmt.Errorf("part %d is %q, not %q", n, have, want)
		}
	}
}

// peekLastWords waits for the last words of the other end, and leaves them unread.
func peekLastWords(c *net.TCPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	have := make([]byte, len(lastWords)+1)
	n := 0
	var failed error
	err = raw.Read(func(fd uintptr) bool {
		n, _, failed = unix.Recvfrom(int(fd), have, unix.MSG_PEEK|unix.MSG_DONTWAIT)
		return !errors.Is(failed, unix.EAGAIN) && (failed != nil || n >= len(lastWords))
	})
	if err := errors.Join(err, failed); err != nil {
		return err
	}
	if string(have[:n]) != lastWords {
		return fmt.Errorf("the last words of the other end are %q", have[:n])
	}
	return nil
}
