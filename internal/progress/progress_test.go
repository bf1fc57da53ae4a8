// SPDX-License-Identifier: Apache-2.0

package progress

import (
	"bytes"
	"strings"
	"sync"
	"testing"
	"time"
)

// lines is a writer that tells of each line.
type lines struct {
	mu   sync.Mutex
	all  bytes.Buffer
	more chan struct{}
}

// Write implements [io.Writer].
func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case l.more <- struct{}{}:
	default:
	}
	return l.all.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all.String()
}

// Without a terminal there is a line for each phase, one now and then, and one
// at the end, the only one with 100 %.
func TestLines(t *testing.T) {
	w := &lines{more: make(chan struct{}, 1)}
	d := New(w, time.Millisecond)
	b := d.Bar("web")
	b.Phase("dump", 4<<20)
	b.Set(1 << 20)
	for !strings.Contains(w.String(), "web: dump (25 %), 1.0 MiB of 4.0 MiB, ") {
		<-w.more
	}
	b.Set(5 << 20) // more than was expected
	for !strings.Contains(w.String(), "web: dump (99 %), 5.0 MiB of 5.0 MiB, ") {
		<-w.more
	}
	b.Phase("store", 0)
	b.Done()
	d.Close()
	text := w.String()
	if !strings.HasPrefix(text, "web: dump (0 %), 0 B of 4.0 MiB\n") || strings.Count(text, "100 %") != 1 || strings.Contains(text, "\x1b") {
		t.Errorf("%s", text)
	}
	all := strings.Split(strings.TrimSpace(text), "\n")
	if last := all[len(all)-1]; !strings.HasPrefix(last, "web: done (100 %), 5.0 MiB in ") || !strings.HasSuffix(last, "/s") {
		t.Errorf("the last is %q", last)
	}
}

// However short it is, it has three lines with its bytes.
func TestShort(t *testing.T) {
	w := &lines{more: make(chan struct{}, 1)}
	d := New(w, time.Hour)
	b := d.Bar("web")
	b.Phase("dump", 10)
	b.Set(10)
	b.Phase("store", 0)
	b.Done()
	d.Close()
	text := w.String()
	for _, want := range []string{"dump (0 %), 0 B of 10 B", "dump (99 %), 10 B of 10 B", "store ", "done (100 %), 10 B in "} {
		if !strings.Contains(text, "web: "+want) {
			t.Errorf("nothing says %q: %s", want, text)
		}
	}
}

// What was not done is not said to be.
func TestFailed(t *testing.T) {
	w := &lines{more: make(chan struct{}, 1)}
	d := New(w, time.Hour)
	d.Bar("web").Phase("dump", 10)
	d.Close()
	if text := w.String(); strings.Contains(text, "100 %") || strings.Contains(text, "done") {
		t.Errorf("%s", text)
	}
}

func TestNone(*testing.T) {
	d := New(nil, time.Hour)
	b := d.Bar("web")
	b.Phase("dump", 10)
	b.Add(3)
	b.Total(4)
	b.Done()
	d.Close()
}

func TestBytes(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1536: "1.5 KiB", 256 << 20: "256.0 MiB", 5 << 40: "5.0 TiB", 5000 << 40: "5000.0 TiB"} {
		if got := Bytes(n); got != want {
			t.Errorf("%d is %s, want %s", n, got, want)
		}
	}
}
