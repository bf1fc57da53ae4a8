// SPDX-License-Identifier: Apache-2.0

package kata

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// What is taken for an answer to start is a socket that can be dialled, and
// one of the two services.
func FuzzParseStart(f *testing.F) {
	for _, s := range []string{
		"unix:///run/kata/sock", ` {"version":3,"address":"unix:///run/s","protocol":"ttrpc"}` + "\n", `{"version":1,"address":"tcp://x"}`, `{"address":"unix:///x y"}`, "",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, out []byte) {
		e, err := ParseStart(out)
		if err != nil {
			return
		}
		if !filepath.IsAbs(e.Path()) || strings.ContainsAny(e.Path(), "\x00 \n") || e.Service() != "containerd.task.v2.Task" && e.Service() != "containerd.task.v3.Task" {
			t.Errorf("%q: %+v", out, e)
		}
	})
}

func FuzzParseAgentURL(f *testing.F) {
	for _, s := range []string{"hvsock:///run/vc/vm/x/clh.sock:1024", "vsock://3:1024", "vsock://4294967296:1", "hvsock://x:1", "remote://y", ":", "unix:///a"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, url string) {
		g, err := parseAgentURL(url)
		if err == nil && (g.hybrid != "" && !filepath.IsAbs(g.hybrid) || g.hybrid == "" && !strings.HasPrefix(url, "vsock://")) {
			t.Errorf("%q: %+v", url, g)
		}
	})
}

// A VMM's answer is one line, and what follows is left to the caller.
func FuzzHybridConnect(f *testing.F) {
	for _, s := range []string{"OK 1073741824\n", "OK 1\nmore", "KO\n", "", "OK", strings.Repeat("O", 100)} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, answer []byte) {
		here, there := net.Pipe()
		defer here.Close()
		go func() {
			defer there.Close()
			if _, err := there.Read(make([]byte, 64)); err == nil {
				_, _ = there.Write(answer)
			}
		}()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		err := hybridConnect(ctx, here, 10750)
		if errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("%q: %v", answer, err)
		}
		line, rest, whole := strings.Cut(string(answer), "\n")
		if err != nil {
			return
		}
		if !strings.HasPrefix(line, "OK") || !whole && len(answer) < 64 {
			t.Errorf("%q is taken for an answer", answer)
		}
		if whole && len(line) < 64 && rest != "" {
			b := make([]byte, 1)
			if _, err := here.Read(b); err != nil || b[0] != rest[0] {
				t.Errorf("%q: what follows is %q, %v", answer, b, err)
			}
		}
	})
}
