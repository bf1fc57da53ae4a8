// Package forward lets calls pass between containerd and Kata's shim that
// nobody here has to read. A server in between costs a wake-up of a thread at
// every hand-over from one goroutine to the next, which is more than all else
// that a forwarded call costs; here a frame that came in is written out by the
// goroutine that read it.
//
// Frames are those of ttrpc's PROTOCOL.md: ten bytes of header (length of the
// data, stream, both big endian, type, flags) and the data.
package forward

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"
)

const (
	headerLength = 10
	// maxData is the protocol's own limit.
	maxData     = 4 << 20
	typeRequest = 1

	// longest is the longest frame that may pass. Longer ones go to the server.
	longest = 16 << 10
	// sendTimeout is for a Kata that does not read its connection: other calls
	// wait behind this one.
	sendTimeout = time.Second
)

// Handshaker has the calls of a server's connections for which pass is true go
// to the socket at path instead, and the answers come back. The connection to
// path is made for the first of them; once it has failed, the server gets all
// calls. What was on its way then is not answered: see plugin/internal/task, pass.
func Handshaker(next ttrpc.Handshaker, path string, pass func(*ttrpc.Request) bool) ttrpc.Handshaker {
	return handshaker{next: next, path: path, pass: pass}
}

type handshaker struct {
	next ttrpc.Handshaker
	path string
	pass func(*ttrpc.Request) bool
}

// Handshake implements [ttrpc.Handshaker].
func (h handshaker) Handshake(ctx context.Context, c net.Conn) (net.Conn, any, error) {
	c, credentials, err := h.next.Handshake(ctx, c)
	if err != nil {
		return nil, nil, err
	}
	return &conn{Conn: c, ctx: ctx, handshaker: h, in: bufio.NewReaderSize(c, longest)}, credentials, nil
}

// conn is a connection from containerd, as the server sees it. Streams have the
// same numbers on both sides, which grow, as the protocol wants it.
type conn struct {
	net.Conn
	handshaker
	ctx context.Context

	// in and left, what the server has yet to read of a frame, are Read's.
	in   *bufio.Reader
	left int

	// out is Write's: the beginning of a frame that the server is writing.
	out []byte
	// sending keeps the server's frames and Kata's apart.
	sending sync.Mutex

	mu   sync.Mutex
	kata net.Conn
	// closed: kata has failed, or the connection was closed.
	closed bool
}

// Read gives the server the frames that are its own.
func (c *conn) Read(p []byte) (int, error) {
	for c.left == 0 {
		header, err := c.in.Peek(headerLength)
		if err != nil {
			return 0, err
		}
		size := frameSize(header)
		passed, err := c.passOn(size)
		if err != nil {
			return 0, err
		}
		if !passed {
			c.left = size
		}
	}
	n, err := c.in.Read(p[:min(len(p), c.left)])
	c.left -= n
	return n, err
}

// passOn sends the next frame to Kata, if it is one to be passed.
func (c *conn) passOn(size int) (bool, error) {
	if size > longest {
		return false, nil
	}
	frame, err := c.in.Peek(size)
	if err != nil {
		return false, err
	}
	if !c.mayPass(frame) {
		return false, nil
	}
	if kata := c.dial(); kata == nil || !c.sendTo(kata, frame) {
		return false, nil
	}
	_, err = c.in.Discard(size)
	return true, err
}

func (c *conn) mayPass(frame []byte) bool {
	var r ttrpc.Request
	return frame[8] == typeRequest && proto.Unmarshal(frame[headerLength:], &r) == nil && c.pass(&r)
}

// sendTo says whether Kata has the frame. If not it has only a part of it, which
// the end of the connection makes void.
func (c *conn) sendTo(kata net.Conn, frame []byte) bool {
	err := kata.SetWriteDeadline(time.Now().Add(sendTimeout))
	if err == nil {
		_, err = kata.Write(frame)
	}
	if err != nil {
		log.G(c.ctx).WithError(err).Warn("calls do not pass to Kata's shim unread any more")
		c.hangUp()
	}
	return err == nil
}

// dial returns the connection to Kata, nil if there is none any more.
func (c *conn) dial() net.Conn {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed || c.kata != nil {
		return c.kata
	}
	kata, err := (&net.Dialer{Timeout: sendTimeout}).DialContext(c.ctx, "unix", c.path)
	if err != nil {
		log.G(c.ctx).WithError(err).Warn("calls do not pass to Kata's shim unread")
		c.closed = true
		return nil
	}
	c.kata = kata
	go func() {
		log.G(c.ctx).WithError(c.answers(kata)).Debug("no more answers of Kata's shim to calls that passed unread")
		c.hangUp()
	}()
	return kata
}

// answers brings Kata's answers, and returns why there are no more.
func (c *conn) answers(kata net.Conn) error {
	in := bufio.NewReader(kata)
	var frame []byte
	for {
		header, err := in.Peek(headerLength)
		if err != nil {
			return err
		}
		size := frameSize(header)
		if size > headerLength+maxData {
			return fmt.Errorf("an answer of %d bytes", size)
		}
		frame = slices.Grow(frame[:0], size)[:size]
		if _, err := io.ReadFull(in, frame); err != nil {
			return err
		}
		if err := c.send(frame); err != nil {
			return err
		}
	}
}

// Write takes what the server writes, which are pieces of frames, and sends
// whole ones.
func (c *conn) Write(p []byte) (int, error) {
	c.out = append(c.out, p...)
	for len(c.out) >= headerLength && len(c.out) >= frameSize(c.out) {
		size := frameSize(c.out)
		if err := c.send(c.out[:size]); err != nil {
			return 0, err
		}
		c.out = c.out[:copy(c.out, c.out[size:])]
	}
	return len(p), nil
}

func (c *conn) send(frame []byte) error {
	c.sending.Lock()
	defer c.sending.Unlock()
	_, err := c.Conn.Write(frame)
	return err
}

// Close closes both connections.
func (c *conn) Close() error {
	err := c.Conn.Close()
	c.hangUp()
	return err
}

// hangUp ends the connection to Kata for good.
func (c *conn) hangUp() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	if c.kata != nil {
		c.kata.Close()
		c.kata = nil
	}
}

// frameSize is a frame's, header included, in bytes.
func frameSize(header []byte) int {
	return headerLength + int(binary.BigEndian.Uint32(header))
}
