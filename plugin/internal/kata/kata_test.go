// SPDX-License-Identifier: Apache-2.0

package kata

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func wantError(t *testing.T, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want one with %q", parts)
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("error %q lacks %q", err, p)
		}
	}
}

func TestArgs(t *testing.T) {
	for in, want := range map[string]string{
		"-namespace n -address /run/c.sock -id i start":   "-namespace n -address /run/c.sock.kata-checkpoint -id i start",
		"--address /run/c.sock start":                     "--address /run/c.sock.kata-checkpoint start",
		"-address=/run/c.sock start":                      "-address=/run/c.sock.kata-checkpoint start",
		"-info":                                           "-info",
		"-id address start":                               "-id address start",
		"-publish-binary /x -address  -id i -debug start": "-publish-binary /x -address .kata-checkpoint -id i -debug start",
		"-address": "-address",
	} {
		args := strings.Split(in, " ")
		if got := strings.Join(Args(args), " "); got != want {
			t.Errorf("%q: got %q, want %q", in, got, want)
		}
		if strings.Join(args, " ") != in {
			t.Errorf("%q: the caller's arguments were changed", in)
		}
	}
}

func TestParseStart(t *testing.T) {
	for name, tc := range map[string]struct {
		in, err string
		want    Endpoint
	}{
		"Kata's bare address":     {in: "unix:///run/containerd/s/ab", want: Endpoint{"unix:///run/containerd/s/ab", 2}},
		"with a line feed":        {in: "unix:///run/s\n", want: Endpoint{"unix:///run/s", 2}},
		"JSON, version 3":         {in: `{"version":3,"address":"unix:///run/s","protocol":"ttrpc"}`, want: Endpoint{"unix:///run/s", 3}},
		"JSON without a version":  {in: `{"address":"unix:///run/s"}`, want: Endpoint{"unix:///run/s", 2}},
		"nothing":                 {in: "", err: "no answer"},
		"blanks":                  {in: " \n", err: "no answer"},
		"rubbish":                 {in: "hello world", err: "downstream_shim"},
		"a path alone":            {in: "/run/s", err: "downstream_shim"},
		"a relative address":      {in: "unix://s", err: "downstream_shim"},
		"two lines":               {in: "unix:///run/s\nwarning: x", err: "downstream_shim"},
		"control characters":      {in: "unix:///run/\x1b[0m", err: "downstream_shim"},
		"a very long answer":      {in: strings.Repeat("x", 1<<16), err: "…"},
		"broken JSON":             {in: `{"version":`, err: "answer of Kata's shim"},
		"gRPC":                    {in: `{"version":3,"address":"unix:///run/s","protocol":"grpc"}`, err: "grpc"},
		"an unknown version":      {in: `{"version":4,"address":"unix:///run/s"}`, err: "version 4"},
		"JSON without an address": {in: `{"version":2}`, err: "downstream_shim"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := ParseStart([]byte(tc.in))
			if tc.err != "" {
				wantError(t, err, tc.err)
				if len(err.Error()) > 1000 {
					t.Errorf("an error of %d characters", len(err.Error()))
				}
				return
			}
			if err != nil || got != tc.want {
				t.Errorf("got %+v, %v", got, err)
			}
		})
	}
	if got := (Endpoint{Version: 3}).Service(); got != "containerd.task.v3.Task" {
		t.Error(got)
	}
}

func script(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "shim")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+content), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestFind(t *testing.T) {
	_, err := Find("/no/such/shim")
	wantError(t, err, "/no/such/shim", "downstream_shim")
	_, err = Find("containerd-shim-nobody-has")
	wantError(t, err, "containerd-shim-nobody-has", "downstream_shim")
	path := script(t, "")
	t.Setenv("PATH", filepath.Dir(path))
	if b, err := Find("shim"); err != nil || b.Path != path {
		t.Errorf("got %+v, %v", b, err)
	}
}

func TestRun(t *testing.T) {
	t.Run("arguments, environment, stdin and the current directory", func(t *testing.T) {
		t.Setenv("SOME", "old")
		b := Binary{Path: script(t, `echo "$@" "$SOME" $(cat) $(pwd)`)}
		dir := t.TempDir()
		t.Chdir(dir)
		out, err := b.Run(t.Context(), Call{Args: []string{"-address", "/c", "start"}, Stdin: strings.NewReader("in"), Env: []string{"SOME=new"}})
		if want := "-address /c.kata-checkpoint start new in " + dir + "\n"; err != nil || string(out) != want {
			t.Errorf("got %q, %v; want %q", out, err, want)
		}
	})
	t.Run("what it says on stderr is no part of the answer", func(t *testing.T) {
		out, err := Binary{Path: script(t, "echo noise >&2; echo answer")}.Run(t.Context(), Call{})
		if err != nil || string(out) != "answer\n" {
			t.Errorf("got %q, %v", out, err)
		}
	})
	t.Run("a failure", func(t *testing.T) {
		_, err := Binary{Path: script(t, "echo the reason >&2; exit 3")}.Run(t.Context(), Call{})
		wantError(t, err, "shim: exit status 3: the reason")
	})
	t.Run("a failure as Kata's Rust shim has them", func(t *testing.T) {
		_, err := Binary{Path: script(t, "echo the reason >&2")}.Run(t.Context(), Call{})
		wantError(t, err, "no answer", "the reason")
	})
	t.Run("a flood of words", func(t *testing.T) {
		_, err := Binary{Path: script(t, "head -c 3000000 /dev/zero | tr '\\0' x >&2; exit 1")}.Run(t.Context(), Call{})
		if err == nil || len(err.Error()) > 5000 {
			t.Errorf("an error of %d characters", len(err.Error()))
		}
	})
	t.Run("a daemon that keeps stdout open", func(t *testing.T) {
		begin := time.Now()
		b := Binary{Path: script(t, "sleep 60 & echo $!")}
		out, err := b.Run(t.Context(), Call{})
		if err != nil || time.Since(begin) > 30*time.Second {
			t.Errorf("%q, %v after %s", out, err, time.Since(begin))
		}
		var pid int
		if _, err := fmt.Sscan(string(out), &pid); err != nil {
			t.Fatal(err)
		}
		p, err := os.FindProcess(pid)
		if err != nil {
			t.Fatal(err)
		}
		_ = p.Kill()
	})
	t.Run("one that does not end", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		_, err := Binary{Path: script(t, "exec sleep 60")}.Run(ctx, Call{})
		wantError(t, err, "killed")
	})
}

func TestParseAgentURL(t *testing.T) {
	for in, want := range map[string]Guest{
		"hvsock:///run/vc/vm/a/clh.sock:1024": {hybrid: "/run/vc/vm/a/clh.sock"},
		"hvsock:///run/a:b/x:1024":            {hybrid: "/run/a:b/x"},
		"vsock://4294967295:1024":             {cid: 4294967295},
		"vsock://3:1024":                      {cid: 3},
	} {
		if got, err := parseAgentURL(in); err != nil || *got != want {
			t.Errorf("%q: got %+v, %v", in, got, err)
		}
	}
	for in, want := range map[string]string{
		"":                          "no port",
		"vsock://3":                 "no port",
		"vsock://x:1024":            "context id",
		"vsock://4294967296:1024":   "context id",
		"hvsock://relative:1024":    "no path",
		"remote:///run/x.sock:1024": "not supported",
		"unix:///run/x:1":           "not supported",
	} {
		_, err := parseAgentURL(in)
		wantError(t, err, want)
	}
}

// management serves /agent-url for a sandbox.
func management(t *testing.T, top string, handler http.HandlerFunc) {
	t.Helper()
	dir := filepath.Join(top, "sb")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(dir, "shim-monitor.sock"))
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /agent-url", handler)
	server := &http.Server{Handler: mux, ReadHeaderTimeout: time.Minute}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(l)
	}()
	t.Cleanup(func() {
		server.Close()
		<-done
	})
}

func TestGuestAddress(t *testing.T) {
	url := func(s string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, s) }
	}
	t.Run("of Kata's Go shim", func(t *testing.T) {
		m := Management{GoDir: t.TempDir(), RustDir: t.TempDir()}
		management(t, m.GoDir, url("vsock://7:1024"))
		g, err := m.Guest(t.Context(), "sb")
		if err != nil || g.cid != 7 || g.HooksHideGuestHook {
			t.Errorf("got %+v, %v", g, err)
		}
	})
	t.Run("of Kata's Rust shim", func(t *testing.T) {
		m := Management{GoDir: t.TempDir(), RustDir: t.TempDir()}
		management(t, m.RustDir, url("hvsock:///x:1024"))
		g, err := m.Guest(t.Context(), "sb")
		if err != nil || g.hybrid != "/x" || !g.HooksHideGuestHook {
			t.Errorf("got %+v, %v", g, err)
		}
	})
	t.Run("an error", func(t *testing.T) {
		m := Management{GoDir: t.TempDir(), RustDir: t.TempDir()}
		management(t, m.GoDir, func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, "no sandbox", http.StatusInternalServerError)
		})
		_, err := m.Guest(t.Context(), "sb")
		wantError(t, err, "ask Kata's shim for its guest's address", "no sandbox")
	})
	t.Run("nobody there", func(t *testing.T) {
		m := Management{GoDir: t.TempDir(), RustDir: t.TempDir()}
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		_, err := m.Guest(ctx, "sb")
		wantError(t, err, "ask Kata's shim for its guest's address")
	})
}

// vmm answers one CONNECT on a hybrid vsock socket.
func vmm(t *testing.T, answer func(net.Conn, string)) *Guest {
	t.Helper()
	path := filepath.Join(t.TempDir(), "v.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		line, err := bufio.NewReader(conn).ReadString('\n')
		if err == nil {
			answer(conn, line)
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-done
	})
	return &Guest{hybrid: path}
}

func TestDialByHybridVsock(t *testing.T) {
	t.Run("what follows the answer is the caller's", func(t *testing.T) {
		var asked string
		g := vmm(t, func(c net.Conn, line string) {
			asked = line
			fmt.Fprint(c, "OK 1073741824\nhello")
		})
		conn, err := g.Dial(t.Context(), 10750)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		data, err := io.ReadAll(conn)
		if err != nil || string(data) != "hello" || asked != "CONNECT 10750\n" {
			t.Errorf("got %q, %v; asked %q", data, err, asked)
		}
	})
	for name, tc := range map[string]struct {
		answer func(net.Conn, string)
		want   string
	}{
		"nobody listens in the guest": {func(net.Conn, string) {}, "nothing in the guest listens"},
		"a refusal":                   {func(c net.Conn, _ string) { fmt.Fprint(c, "ERR\n") }, `"ERR"`},
		"an endless answer":           {func(c net.Conn, _ string) { fmt.Fprint(c, strings.Repeat("x", 1<<12)) }, "xxxx"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := vmm(t, tc.answer).Dial(t.Context(), 1)
			wantError(t, err, tc.want, "port 1")
		})
	}
	t.Run("no VMM", func(t *testing.T) {
		_, err := (&Guest{hybrid: "/no/such/socket"}).Dial(t.Context(), 1)
		wantError(t, err, "/no/such/socket")
	})
	t.Run("no answer", func(t *testing.T) {
		release := make(chan struct{})
		g := vmm(t, func(net.Conn, string) { <-release })
		defer close(release)
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if _, err := g.Dial(ctx, 1); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
	})
}

func TestQuoteKeepsTheEnd(t *testing.T) {
	long := slices.Repeat([]byte("line\n"), 1000)
	if got := quote(append(long, "the last"...)); !strings.HasSuffix(got, "the last") || len(got) > 2100 {
		t.Errorf("%d characters, the end %q", len(got), got[len(got)-20:])
	}
	if got := quote([]byte(" \n")); got != "" {
		t.Errorf("%q", got)
	}
}
