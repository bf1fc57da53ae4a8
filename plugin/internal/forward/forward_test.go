// SPDX-License-Identifier: Apache-2.0

package forward

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/fake"
)

const (
	service   = "test.Service"
	waitLimit = 20 * time.Second
)

// speaker is a service whose only method answers with its name and what was
// said.
func speaker(t *testing.T, name string, options ...ttrpc.ServerOpt) *ttrpc.Server {
	t.Helper()
	server, err := ttrpc.NewServer(options...)
	if err != nil {
		t.Fatal(err)
	}
	server.RegisterService(service, &ttrpc.ServiceDesc{Methods: map[string]ttrpc.Method{
		"Say": func(_ context.Context, unmarshal func(any) error) (any, error) {
			var said wrapperspb.StringValue
			if err := unmarshal(&said); err != nil {
				return nil, err
			}
			return wrapperspb.String(name + ": " + said.Value), nil
		},
	}})
	return server
}

// bed is a server whose calls that say "pass" first are to go to the socket
// kata.
type bed struct {
	kata   string
	client *ttrpc.Client
}

func newBed(t *testing.T) *bed {
	t.Helper()
	dir := t.TempDir()
	b := &bed{kata: filepath.Join(dir, "kata.sock")}
	pass := func(r *ttrpc.Request) bool { return strings.Contains(string(r.Payload), "pass") }
	same := ttrpc.UnixSocketRequireSameUser()
	path := filepath.Join(dir, "shim.sock")
	fake.Serve(t, speaker(t, "shim", ttrpc.WithServerHandshaker(Handshaker(same, b.kata, pass))), path)
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	b.client = ttrpc.NewClient(conn)
	t.Cleanup(func() { b.client.Close() })
	return b
}

// listen is Kata's socket, for a Kata that does as the test says.
func (b *bed) listen(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("unix", b.kata)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func (b *bed) say(ctx context.Context, what string) (string, error) {
	var answer wrapperspb.StringValue
	err := b.client.Call(ctx, service, "Say", wrapperspb.String(what), &answer)
	return answer.Value, err
}

func (b *bed) want(t *testing.T, what, by string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), waitLimit)
	defer cancel()
	if got, err := b.say(ctx, what); err != nil || got != by+": "+what {
		t.Errorf("%.20q was answered %.20q (%v), want by %s", what, got, err, by)
	}
}

// Answers of both come over one connection. None breaks into another, though
// the server writes long ones in pieces.
func TestBothAnswer(t *testing.T) {
	b := newBed(t)
	fake.Serve(t, speaker(t, "kata"), b.kata)
	long := strings.Repeat("x", 200<<10)
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			for j := range 20 {
				b.want(t, fmt.Sprintf("pass %d %d", i, j), "kata")
				b.want(t, fmt.Sprintf("stay %d %d %s", i, j, long), "shim")
			}
		})
	}
	wg.Wait()
}

func TestLongAnswersOfKatas(t *testing.T) {
	b := newBed(t)
	server, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	long := strings.Repeat("x", 1<<20)
	server.RegisterService(service, &ttrpc.ServiceDesc{Methods: map[string]ttrpc.Method{
		"Say": func(context.Context, func(any) error) (any, error) { return wrapperspb.String(long), nil },
	}})
	fake.Serve(t, server, b.kata)
	if got, err := b.say(t.Context(), "pass"); err != nil || got != long {
		t.Errorf("got %d bytes and %v, want %d", len(got), err, len(long))
	}
}

func TestLongRequestsStay(t *testing.T) {
	b := newBed(t)
	fake.Serve(t, speaker(t, "kata"), b.kata)
	b.want(t, "pass", "kata")
	b.want(t, "pass "+strings.Repeat("x", longest), "shim")
	b.want(t, "pass", "kata")
}

func TestWithoutKata(t *testing.T) {
	b := newBed(t)
	b.want(t, "pass", "shim")
}

// A call that was on its way when Kata ended is not answered, what comes later
// is the server's.
func TestKataEnds(t *testing.T) {
	b := newBed(t)
	l := b.listen(t)
	ended := make(chan error, 1)
	go func() {
		kata, err := l.Accept()
		if err == nil {
			_, err = kata.Read(make([]byte, 1))
			err = errors.Join(err, kata.Close())
		}
		ended <- err
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if got, err := b.say(ctx, "pass"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %q and %v, want no answer", got, err)
	}
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	b.want(t, "pass", "shim")
	b.want(t, "stay", "shim")
}

// Frames that answer nothing do not reach containerd: they end the connection.
func TestKataSpeaksOutOfTurn(t *testing.T) {
	for name, frame := range map[string][]byte{
		"an answer to no call": {0, 0, 0, 0, 0, 0, 0, 99, typeResponse, 0},
		"data":                 {0, 0, 0, 0, 0, 0, 0, 1, 3, 0},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBed(t)
			l := b.listen(t)
			ended := make(chan error, 1)
			go func() {
				kata, err := l.Accept()
				if err == nil {
					defer kata.Close()
					_, err = kata.Read(make([]byte, 4096))
				}
				if err == nil {
					_, err = kata.Write(frame)
				}
				if err == nil {
					_, err = kata.Read(make([]byte, 1))
				}
				ended <- err
			}()
			ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
			defer cancel()
			if got, err := b.say(ctx, "pass"); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("got %q and %v, want no answer", got, err)
			}
			select {
			case err := <-ended:
				if !errors.Is(err, io.EOF) {
					t.Errorf("read %v, want the end", err)
				}
			case <-time.After(waitLimit):
				t.Fatal("the connection is still open")
			}
			b.want(t, "pass", "shim")
		})
	}
}

// A Kata that has stopped to read holds up nobody for long.
func TestKataDoesNotRead(t *testing.T) {
	b := newBed(t)
	b.listen(t) // the socket's backlog takes the connection
	ctx, cancel := context.WithTimeout(t.Context(), waitLimit)
	defer cancel()
	answered := make(chan string)
	var wg sync.WaitGroup
	for range 100 { // more than the socket holds
		wg.Go(func() {
			if got, err := b.say(ctx, "pass "+strings.Repeat("x", longest/2)); err == nil {
				select {
				case answered <- got[:4]:
				case <-ctx.Done():
				}
			}
		})
	}
	select {
	case by := <-answered:
		if by != "shim" {
			t.Errorf("answered by %s", by)
		}
	case <-ctx.Done():
		t.Error("nobody answers")
	}
	b.want(t, "stay", "shim")
	cancel()
	wg.Wait()
}

// The connection to Kata ends with containerd's.
func TestContainerdGoes(t *testing.T) {
	b := newBed(t)
	l := b.listen(t)
	go func() { _, _ = b.say(t.Context(), "pass") }()
	kata, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer kata.Close()
	if _, err := kata.Read(make([]byte, 4096)); err != nil {
		t.Fatal(err)
	}
	b.client.Close()
	if err := kata.SetReadDeadline(time.Now().Add(waitLimit)); err != nil {
		t.Fatal(err)
	}
	if n, err := kata.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("read %d bytes (%v), want the end", n, err)
	}
}
