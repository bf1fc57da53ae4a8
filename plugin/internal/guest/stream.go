// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"encoding/binary"
	"net"
	"sync"
)

// The header of a ttrpc frame (PROTOCOL.md of ttrpc 1.2): the length of the data
// and the stream's number, both big endian, a type and flags.
const (
	headerLength = 10
	typeRequest  = 1
	typeResponse = 2
)

// maxAnswer is the longest answer in bytes, the protocol's own limit.
const maxAnswer = 4 << 20

// strict is a connection on which the peer says nothing but one answer to each
// request. ttrpc's client logs a line for every other frame and reads on, so
// that a peer could fill the host's log, and it reads up to 4 GiB of an answer
// that is too long. Here, the first such frame ends the connection.
type strict struct {
	net.Conn

	// sent and received follow the frames of each direction. They belong to
	// Write and Read, of which there is one at a time.
	sent, received frames

	mu sync.Mutex
	// open has the streams of requests without an answer.
	open map[uint32]bool
	// broken is why the connection was closed, nil for other reasons.
	broken error
}

func newStrict(c net.Conn) *strict { return &strict{Conn: c, open: make(map[uint32]bool)} }

// Write notes which streams a request is sent on.
func (s *strict) Write(p []byte) (int, error) {
	_ = s.sent.follow(p, func(h header) error { // what the client itself sends is well formed
		if h.kind == typeRequest {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.open[h.stream] = true
		}
		return nil
	})
	return s.Conn.Write(p)
}

// Read fails at the first frame that is not the answer to a request.
func (s *strict) Read(p []byte) (int, error) {
	n, err := s.Conn.Read(p)
	if verr := s.received.follow(p[:n], s.accept); verr != nil {
		s.hangUp(verr)
		return 0, verr
	}
	return n, err
}

// hangUp closes the connection because of what the peer has said.
func (s *strict) hangUp(why error) {
	s.mu.Lock()
	if s.broken == nil {
		s.broken = why
	}
	s.mu.Unlock()
	s.Close()
}

// violation returns why the connection was closed by hangUp.
func (s *strict) violation() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.broken
}

func (s *strict) accept(h header) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case h.kind != typeResponse:
		return violation("it sends a frame of type %d", h.kind)
	case !s.open[h.stream]:
		return violation("it answers a request that it has not got")
	case h.length > maxAnswer:
		return violation("its answer has %d bytes", h.length)
	}
	delete(s.open, h.stream)
	return nil
}

type header struct {
	length, stream uint32
	kind           byte
}

// frames finds the headers in one direction of a connection, in whatever pieces
// it comes.
type frames struct {
	header [headerLength]byte
	// have is how much of the next header there is, left how much data comes
	// before it.
	have int
	left uint32
}

// follow calls f for each header that is complete with p, until it fails.
func (f *frames) follow(p []byte, found func(header) error) error {
	for len(p) > 0 {
		if f.left > 0 {
			n := min(uint32(len(p)), f.left) //nolint:gosec // a piece of a buffer
			f.left -= n
			p = p[n:]
			continue
		}
		n := copy(f.header[f.have:], p)
		f.have += n
		p = p[n:]
		if f.have < headerLength {
			return nil
		}
		f.have = 0
		h := header{length: binary.BigEndian.Uint32(f.header[:]), stream: binary.BigEndian.Uint32(f.header[4:]), kind: f.header[8]}
		f.left = h.length
		if err := found(h); err != nil {
			return err
		}
	}
	return nil
}
