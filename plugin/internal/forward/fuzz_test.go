// SPDX-License-Identifier: Apache-2.0

package forward

import (
	"bytes"
	"context"
	"io"
	"net"
	"slices"
	"testing"

	"github.com/containerd/ttrpc"
)

// Whatever containerd sends, the server sees it as it is when nobody takes a
// part of it.
func FuzzRead(f *testing.F) {
	f.Add([]byte{0, 0, 0, 3, 0, 0, 0, 1, typeRequest, 0, 'a', 'b', 'c'}, uint8(0))
	f.Add([]byte{0, 0, 0, 0, 0, 0, 0, 1, typeResponse, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 3, 3, 7, 1, 2, 3}, uint8(5))
	f.Add([]byte{0, 0, 0x40, 0, 0, 0, 0, 1, typeRequest, 0}, uint8(9))
	f.Fuzz(func(t *testing.T, data []byte, piece uint8) {
		here, there := net.Pipe()
		server, _, err := Handshaker(plain{}, "/nowhere", func(*ttrpc.Request) bool { return false }).Handshake(t.Context(), here)
		if err != nil {
			t.Fatal(err)
		}
		defer server.Close()
		go func() {
			defer there.Close()
			for part := range slices.Chunk(data, int(piece)+1) {
				if _, err := there.Write(part); err != nil {
					return
				}
			}
		}()
		got, _ := io.ReadAll(server)
		// Of a last frame that is not whole, the server may see nothing.
		if !bytes.HasPrefix(data, got) {
			t.Errorf("of %q the server sees %q", data, got)
		}
		if whole := wholeFrames(data); len(got) < whole {
			t.Errorf("of %d bytes in whole frames the server sees %d", whole, len(got))
		}
	})
}

func wholeFrames(data []byte) (n int) {
	for len(data)-n >= headerLength && frameSize(data[n:]) <= len(data)-n {
		n += frameSize(data[n:])
	}
	return n
}

// plain is no handshake at all.
type plain struct{}

func (plain) Handshake(_ context.Context, c net.Conn) (net.Conn, any, error) { return c, nil, nil }
