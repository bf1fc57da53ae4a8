// SPDX-License-Identifier: Apache-2.0

// Package forward passes calls between containerd and Kata's shim that this
// shim does not have to read. A ttrpc server in between costs a thread wake-up
// at every hand-over from one goroutine to the next, which is most of the price
// of a forwarded call. Here, the goroutine that reads a frame writes it. On the
// stand-in (TCG, 2 cores, a Kill of 4 ms) Kill takes 1.15 times as long through
// the server as without this shim, and 1.03 times as long through this package
// (make bench).
//
// Written against ttrpc 1.2, whose frames (PROTOCOL.md) have a header of ten
// bytes (length of the data and stream, both big endian, type, flags), followed
// by the data.
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
	maxData      = 4 << 20
	typeRequest  = 1
	typeResponse = 2

	// longest is the size of the longest frame that may pass. The server gets
	// longer ones.
	longest = 16 << 10
	// sendTimeout is for a Kata that does not read from its connection: other
	// calls wait for this one.
	sendTimeout = time.Second
)

// Handshaker redirects those calls on a server's connections for which pass
// returns true to the socket at path, and returns the answers. It connects to
// path for the first of them. Once that connection has failed, the server gets
// all calls. Calls in flight are not answered then: see Service.pass in
// plugin/internal/task.
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
	return &conn{Conn: c, ctx: ctx, handshaker: h, in: bufio.NewReaderSize(c, longest), passed: make(map[uint32]bool)}, credentials, nil
}

// conn is a connection from containerd, as the server sees it. Streams have the
// same numbers on both sides, which increase, as the protocol requires.
type conn struct {
	net.Conn
	handshaker
	ctx context.Context

	// in and left, what the server has yet to read of a frame, belong to Read.
	in   *bufio.Reader
	left int

	// out belongs to Write: the beginning of a frame that the server is writing.
	out []byte
	// sending serializes the frames of the server and of Kata.
	sending sync.Mutex

	mu   sync.Mutex
	kata net.Conn
	// passed has the streams of calls that Kata has and has not answered.
	passed map[uint32]bool
	// closed: kata has failed, or the connection was closed.
	closed bool
}

// Read returns the frames that are for the server.
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

// passOn sends the next frame to Kata if it may pass.
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
	kata := c.dial()
	if kata == nil {
		return false, nil
	}
	stream := binary.BigEndian.Uint32(frame[4:])
	c.mu.Lock()
	c.passed[stream] = true // the answer may come before sendTo returns
	c.mu.Unlock()
	if !c.sendTo(kata, frame) {
		return false, nil
	}
	_, err = c.in.Discard(size)
	return true, err
}

func (c *conn) mayPass(frame []byte) bool {
	var r ttrpc.Request
	return frame[8] == typeRequest && proto.Unmarshal(frame[headerLength:], &r) == nil && c.pass(&r)
}

// sendTo reports whether Kata has the whole frame. Kata discards a part of one
// when the connection is closed.
func (c *conn) sendTo(kata net.Conn, frame []byte) bool {
	err := kata.SetWriteDeadline(time.Now().Add(sendTimeout))
	if err == nil {
		_, err = kata.Write(frame)
	}
	if err != nil {
		log.G(c.ctx).WithError(err).Warn("failed to pass calls to Kata's shim, forwarding them instead")
		c.hangUp()
	}
	return err == nil
}

// dial returns the connection to Kata, nil once it has failed.
func (c *conn) dial() net.Conn {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed || c.kata != nil {
		return c.kata
	}
	kata, err := (&net.Dialer{Timeout: sendTimeout}).DialContext(c.ctx, "unix", c.path)
	if err != nil {
		log.G(c.ctx).WithError(err).Warn("failed to connect to Kata's shim for passing calls, forwarding them instead")
		c.closed = true
		return nil
	}
	c.kata = kata
	go func() {
		log.G(c.ctx).WithError(c.answers(kata)).Debug("connection to Kata's shim for passed calls closed")
		c.hangUp()
	}()
	return kata
}

// answers copies Kata's answers until that fails. A frame that answers no call
// that was passed ends the connection: containerd would log a line for it.
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
		if stream := binary.BigEndian.Uint32(header[4:]); header[8] != typeResponse || !c.answered(stream) {
			return fmt.Errorf("a frame of type %d on stream %d, which is no answer", header[8], stream)
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

// answered reports whether Kata has yet to answer on a stream, which it does
// once.
func (c *conn) answered(stream uint32) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	passed := c.passed[stream]
	delete(c.passed, stream)
	return passed
}

// Write accepts pieces of frames from the server and sends whole ones.
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

// hangUp closes the connection to Kata permanently.
func (c *conn) hangUp() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	if c.kata != nil {
		c.kata.Close()
		c.kata = nil
	}
}

// frameSize is the size of a frame in bytes, including its header.
func frameSize(header []byte) int {
	return headerLength + int(binary.BigEndian.Uint32(header))
}
