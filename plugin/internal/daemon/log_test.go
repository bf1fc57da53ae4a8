// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestLogIsKeptWhileNobodyReads(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	read := func() *os.File {
		f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		if err := f.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
			t.Fatal(err)
		}
		return f
	}
	first := read()
	to, err := os.OpenFile(path, os.O_WRONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	k := &keeper{to: to, retry: 5 * time.Millisecond}
	say := func(line string) {
		if _, err := fmt.Fprintln(k, line); err != nil {
			t.Error(err)
		}
	}
	expect := func(from *bufio.Reader, want ...string) {
		t.Helper()
		for _, w := range want {
			line, err := from.ReadString('\n')
			if err != nil || strings.TrimSpace(line) != w {
				t.Fatalf("read %q (error %v), not %q", line, err, w)
			}
		}
	}

	say("one")
	expect(bufio.NewReader(first), "one")
	first.Close()
	say("two")
	say("three")
	second := bufio.NewReader(read())
	expect(second, "two", "three") // without another line that would bring them along
	say("four")
	expect(second, "four")
}

func TestLogThatNobodyReadsIsBounded(t *testing.T) {
	k := &keeper{to: nobody{}, retry: time.Hour}
	for i := range keptLimit {
		fmt.Fprintln(k, "line", i)
	}
	if len(k.kept) > keptLimit || len(k.kept) < keptLimit/2 {
		t.Errorf("%d bytes are kept", len(k.kept))
	}
	lines := strings.Split(strings.TrimSpace(string(k.kept)), "\n")
	if first, last := lines[0], lines[len(lines)-1]; !strings.HasPrefix(first, "line ") || last != fmt.Sprint("line ", keptLimit-1) {
		t.Errorf("from %q to %q is kept", first, last)
	}
}

// nobody is a FIFO without a reader.
type nobody struct{}

func (nobody) Write([]byte) (int, error) { return 0, unix.EPIPE }
