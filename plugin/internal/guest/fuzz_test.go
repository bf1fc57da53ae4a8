// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bytes"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/text"
)

// What passes can be decoded, is bounded, and can be printed.
func FuzzAnswers(f *testing.F) {
	for _, m := range []proto.Message{
		&api.CheckpointResponse{
			Hostname: "host", KernelRelease: "6.1", CpuFeatures: []string{"fpu"}, Phases: []*api.Phase{{Name: "criu dump", Nanoseconds: 1}},
			Stdio: []*api.Stdio{{Fd: 1, Key: "pipe:[7]"}}, Externals: []*api.External{{Name: "m0", Destination: "/data"}},
			OpenFiles: []*api.OpenFile{{Path: []byte("/data/f"), Size: 5}}, Connections: []*api.Connection{{Local: "1.2.3.4:5", Remote: "[::1]:6"}},
		},
		&api.CheckpointResponse{Phases: slices.Repeat([]*api.Phase{{}}, maxList+1)},
	} {
		data, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte{0x12, 1, 0xff})
	f.Add([]byte{0xa2, 0x06, 3, 'n', 'e', 'w'})
	f.Fuzz(func(t *testing.T, data []byte) {
		if checkAnswer("Checkpoint", data) != nil {
			return
		}
		var m api.CheckpointResponse
		if err := proto.Unmarshal(data, &m); err != nil {
			if utf8.Valid(data) || !strings.Contains(err.Error(), "UTF-8") { // of what a container chooses
				t.Skip(err)
			}
			return
		}
		if len(m.GetPhases()) > maxList || len(m.GetStdio()) > maxList || len(m.GetHostname()) > maxText {
			t.Errorf("%d phases, %d descriptors, a host name of %d bytes", len(m.GetPhases()), len(m.GetStdio()), len(m.GetHostname()))
		}
		for _, p := range m.GetPhases() {
			if !text.IsLines([]byte(p.GetName())) {
				t.Errorf("a phase %q", p.GetName())
			}
		}
	})
}

// What a connection lets pass is one answer for each request, whole, and in
// whatever pieces it came.
func FuzzStream(f *testing.F) {
	f.Add(slices.Concat(frame(1, typeResponse, "one"), frame(3, typeResponse, "")), uint8(1))
	f.Add(slices.Concat(frame(3, typeResponse, "three"), frame(3, typeResponse, "again")), uint8(11))
	f.Add(frame(1, 3, "data"), uint8(0))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1, typeResponse, 0}, uint8(4))
	f.Fuzz(func(t *testing.T, data []byte, piece uint8) {
		here, there := net.Pipe()
		s := newStrict(here)
		defer s.Close()
		go io.Copy(io.Discard, there) //nolint:errcheck // until it is closed
		for _, stream := range []uint32{1, 3} {
			if _, err := s.Write(frame(stream, typeRequest, "")); err != nil {
				t.Fatal(err)
			}
		}
		go func() {
			defer there.Close()
			for part := range slices.Chunk(data, int(piece)+1) {
				if _, err := there.Write(part); err != nil {
					return
				}
			}
		}()
		got, err := io.ReadAll(s)
		if !bytes.HasPrefix(data, got) || err == nil && len(got) != len(data) {
			t.Errorf("of %q it lets pass %q, %v", data, got, err)
		}
		seen := map[uint32]bool{}
		if err := new(frames).follow(got, func(h header) error {
			if h.kind != typeResponse || h.length > maxAnswer || seen[h.stream] || h.stream != 1 && h.stream != 3 {
				t.Errorf("%+v passes", h)
			}
			seen[h.stream] = true
			return nil
		}); err != nil {
			t.Error(err)
		}
	})
}
