// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"google.golang.org/protobuf/proto"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/text"
)

func TestAnswers(t *testing.T) {
	phases := func(n int) *api.CheckpointResponse {
		return &api.CheckpointResponse{Phases: slices.Repeat([]*api.Phase{{}}, n)}
	}
	for name, tc := range map[string]struct {
		method string
		answer proto.Message
		raw    []byte
		err    string
	}{
		"nothing": {method: "Freeze"},
		"a checkpoint": {method: "Checkpoint", answer: &api.CheckpointResponse{
			KernelRelease: "6.1.0-1-amd64", Hostname: "any\x01thing", CpuFeatures: slices.Repeat([]string{"fpu"}, 200),
			OpenFiles: slices.Repeat([]*api.OpenFile{{Path: []byte("/data/a\nb\xff"), Size: 5}}, 10000), Externals: []*api.External{{Name: "m0", Destination: "/data"}},
			Sockets:    slices.Repeat([]*api.Socket{{Pid: 1, Memberships: slices.Repeat([]*api.Membership{{Sources: slices.Repeat([]string{"10.0.0.1"}, 65)}}, 65)}}, 65),
			Attributes: slices.Repeat([]*api.Attribute{{Pid: 1, Name: "cpus", Value: "0"}}, 10000),
		}},
		"problems of two lines":    {method: "Info", answer: &api.InfoResponse{Version: "1.0", Problems: []string{"one\ntwo — three"}}},
		"a field of a newer agent": {method: "Exec", raw: []byte{0xa2, 0x06, 3, 'n', 'e', 'w'}},

		"millions of phases":       {method: "Checkpoint", answer: phases(2 << 20), err: "more than 64 elements"},
		"a phase too many":         {method: "Restore", answer: &api.RestoreResponse{Phases: phases(65).Phases}, err: "more than 64 elements"},
		"as many open files":       {method: "Checkpoint", answer: &api.CheckpointResponse{OpenFiles: slices.Repeat([]*api.OpenFile{{}}, 1<<16+1)}, err: "more than 65536 elements"},
		"a host name of megabytes": {method: "Checkpoint", answer: &api.CheckpointResponse{Hostname: strings.Repeat("\x01", 3<<20)}, err: "hostname of 3145728 bytes"},
		"text in a list":           {method: "Checkpoint", answer: &api.CheckpointResponse{Externals: []*api.External{{Name: strings.Repeat("m", 5000)}}}, err: "name of 5000 bytes"},
		"a command to a terminal":  {method: "Info", answer: &api.InfoResponse{Version: "1\x1b]0;title\x07"}, err: "version that cannot be printed"},
		"bytes that are no text":   {method: "Info", raw: []byte{0x12, 1, 0xff}, err: "version that cannot be printed"},
		"unknown fields":           {method: "Exec", raw: bytes.Repeat([]byte{0xa2, 0x06, 0}, 65), err: "more than 64 elements"},
		"a field that ends early":  {method: "Info", raw: []byte{0x12, 9, 'a'}, err: "unexpected EOF"},
	} {
		t.Run(name, func(t *testing.T) {
			data := tc.raw
			if tc.answer != nil {
				var err error
				if data, err = proto.Marshal(tc.answer); err != nil {
					t.Fatal(err)
				}
			}
			err := checkAnswer(tc.method, data)
			if tc.err == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if !errors.As(err, new(violationError)) || !strings.Contains(err.Error(), tc.err) {
				t.Errorf("error %v, want one with %q", err, tc.err)
			}
		})
	}
}

// What an agent says is checked on the way to every caller.
func TestAnAgentThatLies(t *testing.T) {
	g, a := connect(t, nil)
	call := func() error {
		return a.CallIdempotent(t.Context(), func(ctx context.Context, s api.AgentService) error {
			_, err := s.Info(ctx, &api.InfoRequest{Check: true})
			return err
		})
	}
	g.SetProblems(slices.Repeat([]string{"no"}, 65)...)
	if err := call(); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "does not keep to the protocol") {
		t.Errorf("a long list: %v", err)
	}
	g.SetProblems()
	if err := call(); err != nil {
		t.Errorf("the next call: %v", err)
	}

	g.Before("Forget", func(context.Context) error {
		return errdefs.ErrNotFound.WithMessage("\x1b[2Jthe end" + strings.Repeat("!", 1<<20))
	})
	err := a.CallIdempotent(t.Context(), forget)
	if err == nil || !strings.HasPrefix(err.Error(), "?[2Jthe end!") || len(err.Error()) > text.MaxError+100 {
		t.Errorf("an error of %d bytes: %.50v", len(err.Error()), err)
	}
}

// frame is one of ttrpc.
func frame(stream uint32, kind byte, data string) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(data)))
	b = binary.BigEndian.AppendUint32(b, stream)
	return append(append(b, kind, 0), data...)
}

// An agent that speaks out of turn is hung up on, and makes no line of the log.
func TestAnAgentThatFloods(t *testing.T) {
	var logged lines
	log.L.Logger.SetOutput(&logged)
	defer log.L.Logger.SetOutput(io.Discard)
	long := frame(1, typeResponse, "")
	binary.BigEndian.PutUint32(long, maxAnswer+1)
	for name, tc := range map[string]struct {
		sends []byte
		err   string
	}{
		"answers nobody asked for":      {bytes.Repeat(frame(99, typeResponse, ""), 1000), "a request that it has not got"},
		"data of an answer":             {bytes.Repeat(frame(1, 3, ""), 1000), "frame of type 3"},
		"requests":                      {bytes.Repeat(frame(2, typeRequest, "x"), 1000), "frame of type 1"},
		"an answer longer than allowed": {long, "4194305 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			here, there := net.Pipe()
			closed := make(chan struct{})
			go func() {
				defer close(closed)
				if _, err := there.Read(make([]byte, headerLength)); err != nil {
					t.Error(err)
					return
				}
				go io.Copy(io.Discard, there) //nolint:errcheck // until it is closed
				for {
					if _, err := there.Write(tc.sends); err != nil {
						return
					}
				}
			}()
			a := New(func(context.Context) (net.Conn, error) { return here, nil }, func() {})
			defer a.Close()
			if err := a.Connect(t.Context()); err == nil || !strings.Contains(err.Error(), tc.err) {
				t.Errorf("error %v, want one with %q", err, tc.err)
			}
			select {
			case <-closed:
			case <-time.After(waitLimit):
				t.Error("the connection is still open")
			}
		})
	}
	if n := logged.count(); n > 0 {
		t.Errorf("there are %d lines in the log", n)
	}
}

type lines struct {
	mu sync.Mutex
	n  int
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.n += bytes.Count(p, []byte("\n"))
	return len(p), nil
}

func (l *lines) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.n
}

// A second answer to a request is none; an answer that comes in pieces is one.
func TestStreamsInPieces(t *testing.T) {
	here, there := net.Pipe()
	defer there.Close()
	s := newStrict(here)
	defer s.Close()
	request := slices.Concat(frame(1, typeRequest, "data"), frame(3, typeRequest, ""))
	go io.Copy(io.Discard, there) //nolint:errcheck // until it is closed
	for _, b := range request {
		if _, err := s.Write([]byte{b}); err != nil {
			t.Fatal(err)
		}
	}
	answers := slices.Concat(frame(3, typeResponse, "three"), frame(1, typeResponse, ""))
	go func() {
		for _, b := range answers {
			if _, err := there.Write([]byte{b}); err != nil {
				t.Error(err)
			}
		}
		_, _ = there.Write(frame(3, typeResponse, "again"))
	}()
	got := make([]byte, len(answers))
	if _, err := io.ReadFull(s, got); err != nil || !bytes.Equal(got, answers) {
		t.Errorf("read %q, %v", got, err)
	}
	if _, err := s.Read(got); !errors.As(err, new(violationError)) {
		t.Errorf("a second answer: %v", err)
	}
}

func TestReportsOfAnAgentThatHangsUp(t *testing.T) {
	a := &Agent{}
	for i, tc := range []struct{ age, want time.Duration }{
		{age: time.Hour}, {want: lostPause}, {age: time.Second, want: 2 * lostPause}, {want: 4 * lostPause},
		{age: shortLife}, {want: lostPause},
	} {
		if got := a.pauseAfter(tc.age); got != tc.want {
			t.Errorf("%d: %v after one that lived for %v, want %v", i, got, tc.age, tc.want)
		}
	}
	for range 20 {
		a.pauseAfter(0)
	}
	if got := a.pauseAfter(0); got != lostLimit {
		t.Errorf("in the end: %v", got)
	}
}
