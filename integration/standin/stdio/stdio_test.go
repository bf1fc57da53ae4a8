// SPDX-License-Identifier: Apache-2.0

package stdio

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/way"
)

type sink struct {
	strings.Builder
	closed chan struct{}
}

func (s *sink) Close() error { close(s.closed); return nil }

func fifos(t *testing.T) Paths {
	t.Helper()
	dir := t.TempDir()
	p := Paths{Stdin: filepath.Join(dir, "in"), Stdout: filepath.Join(dir, "out"), Stderr: filepath.Join(dir, "err")}
	for _, path := range []string{p.Stdin, p.Stdout, p.Stderr} {
		if err := syscall.Mkfifo(path, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return p
}

func waitFor(t *testing.T, what string, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(10 * time.Second):
		t.Fatalf("%s: not in time", what)
	}
}

func TestStdinEndsWithCloseStdin(t *testing.T) {
	for _, w := range []way.Way{way.Go, way.Rust} {
		t.Run(string(w), func(t *testing.T) {
			p := fifos(t)
			in := &sink{closed: make(chan struct{})}
			outR, outW := io.Pipe()
			c, err := Start(w, "ns", "id", p, Guest{Stdin: in, Stdout: outR, Stderr: strings.NewReader("")})
			if err != nil {
				t.Fatal(err)
			}
			engine, err := os.OpenFile(p.Stdin, os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := engine.WriteString("input"); err != nil {
				t.Fatal(err)
			}
			engine.Close()
			if err := c.CloseStdin(); err != nil {
				t.Fatal(err)
			}
			waitFor(t, "the end of stdin", in.closed)
			if in.String() != "input" {
				t.Errorf("the guest got %q", in.String())
			}
			outW.Close()
			waitFor(t, "the end of the output", c.Done())
		})
	}
}

func TestOutputGoesToTheFifosAndThenItIsDone(t *testing.T) {
	p := fifos(t)
	readers := map[string]*os.File{}
	for _, path := range []string{p.Stdout, p.Stderr} {
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		readers[path] = f
	}
	c, err := Start(way.Go, "ns", "id", p, Guest{Stdin: &sink{closed: make(chan struct{})}, Stdout: strings.NewReader("out"), Stderr: strings.NewReader("err")})
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{p.Stdout: "out", p.Stderr: "err"} {
		got := make([]byte, 16)
		n, err := readers[path].Read(got)
		if err != nil || string(got[:n]) != want {
			t.Errorf("%q %v, want %q", got[:n], err, want)
		}
	}
	waitFor(t, "the end of the output", c.Done())
}

func TestALoggerGetsTheOutputAndItsEnd(t *testing.T) {
	dir := t.TempDir()
	script := filepath.Join(dir, "logger")
	log := filepath.Join(dir, "log")
	err := os.WriteFile(script, []byte("#!/bin/sh\ntrap '' TERM\nexec 5>&-\n{ echo $CONTAINER_NAMESPACE/$CONTAINER_ID $1 $2; cat <&3; } > "+log+"\n"), 0o755)
	if err != nil {
		t.Fatal(err)
	}
	c, err := Start(way.Go, "ns", "id", Paths{Stdout: "binary://" + script + "?key=value"}, Guest{Stdout: strings.NewReader("out\n"), Stderr: strings.NewReader("")})
	if err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the logger", c.Done())
	got, err := os.ReadFile(log)
	if err != nil || string(got) != "ns/id key value\nout\n" {
		t.Errorf("%q %v", got, err)
	}
}
