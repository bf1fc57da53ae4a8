// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func newCounter(t *testing.T) *counter {
	t.Helper()
	dir := t.TempDir()
	c := &counter{file: filepath.Join(dir, "file"), shm: filepath.Join(dir, "shm")}
	if err := c.reset(); err != nil {
		t.Fatal(err)
	}
	return c
}

func rounds(t *testing.T, p program, n int) string {
	t.Helper()
	var out bytes.Buffer
	for range n {
		if err := p.round(&out); err != nil {
			t.Fatal(err)
		}
	}
	return out.String()
}

func TestCounterCounts(t *testing.T) {
	have := rounds(t, newCounter(t), 3)
	if want := "tick 1 file 1 shm 1\ntick 2 file 2 shm 2\ntick 3 file 3 shm 3\n"; have != want {
		t.Errorf("printed %q, want %q", have, want)
	}
}

func TestCounterNoticesWhatIsOfAnotherInstant(t *testing.T) {
	for name, spoil := range map[string]func(*counter) error{
		"file is newer":      func(c *counter) error { return os.WriteFile(c.file, []byte("4\n"), 0o600) },
		"/dev/shm is older":  func(c *counter) error { return os.WriteFile(c.shm, []byte("2\n"), 0o600) },
		"/dev/shm is empty":  func(c *counter) error { return os.Remove(c.shm) },
		"memory is older":    func(c *counter) error { c.n--; return nil },
		"file is half there": func(c *counter) error { return os.Truncate(c.file, 0) },
	} {
		t.Run(name, func(t *testing.T) {
			c := newCounter(t)
			rounds(t, c, 3)
			if err := spoil(c); err != nil {
				t.Fatal(err)
			}
			var out bytes.Buffer
			if err := c.round(&out); err == nil || out.Len() > 0 {
				t.Errorf("went on with %q, error %v", out.String(), err)
			}
		})
	}
}

func newFiles(t *testing.T) *openFiles {
	t.Helper()
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	if err := os.WriteFile(in("hosts"), []byte("127.0.0.1 localhost\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	o := &openFiles{volume: in("volume"), root: in("root"), shm: in("shm"), deleted: in("deleted"), mapped: in("mapped"), constant: []string{in("hosts")}}
	if err := o.open(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, f := range o.growing {
			f.f.Close()
		}
		for _, f := range o.fixed {
			f.f.Close()
		}
	})
	return o
}

func TestFilesNoticeEveryChange(t *testing.T) {
	appendTo := func(f *os.File, text string) error {
		_, err := f.WriteString(text)
		return err
	}
	for name, spoil := range map[string]func(*openFiles) error{
		"volume grew":           func(o *openFiles) error { return appendTo(o.growing[0].f, "x") },
		"root shrank":           func(o *openFiles) error { return o.growing[1].f.Truncate(5) },
		"deleted is empty":      func(o *openFiles) error { return o.growing[3].f.Truncate(0) },
		"deleted has a name":    func(o *openFiles) error { return os.WriteFile(o.deleted, nil, 0o600) },
		"two are swapped":       func(o *openFiles) error { o.growing[0].f, o.growing[1].f = o.growing[1].f, o.growing[0].f; return nil },
		"constant has changed":  func(o *openFiles) error { return os.WriteFile(o.constant[0], []byte("127.0.0.2"), 0o600) },
		"constant has no name":  func(o *openFiles) error { return os.Remove(o.constant[0]) },
		"memory is a round old": func(o *openFiles) error { o.n--; return nil },
		"mapped is another's":   func(o *openFiles) error { o.memory[3] = 1; return nil },
	} {
		t.Run(name, func(t *testing.T) {
			o := newFiles(t)
			if have := rounds(t, o, 2); have != "round 1 files 5\nround 2 files 5\n" {
				t.Fatalf("printed %q", have)
			}
			if err := spoil(o); err != nil {
				t.Fatal(err)
			}
			if err := o.round(&bytes.Buffer{}); err == nil {
				t.Error("went on")
			}
		})
	}
}

func TestMemoryNoticesEveryChange(t *testing.T) {
	for name, spoil := range map[string]func(*memory) error{
		"a bit of memory":     func(m *memory) error { m.data[1][12345] ^= 4; return nil },
		"two blocks swapped":  func(m *memory) error { m.data[0], m.data[1] = m.data[1], m.data[0]; return nil },
		"a bit of /dev/shm":   func(m *memory) error { _, err := m.file.WriteAt([]byte{m.buffer[7] ^ 1}, 7); return err },
		"/dev/shm is shorter": func(m *memory) error { return m.file.Truncate(17) },
	} {
		t.Run(name, func(t *testing.T) {
			m := &memory{mib: 2, shmMiB: 1, shm: filepath.Join(t.TempDir(), "shm")}
			if err := m.fill(); err != nil {
				t.Fatal(err)
			}
			defer m.file.Close()
			if have := rounds(t, m, 3); !strings.HasSuffix(have, "round 3 memory 2 shm 1\n") {
				t.Fatalf("printed %q", have)
			}
			if err := spoil(m); err != nil {
				t.Fatal(err)
			}
			if err := m.round(&bytes.Buffer{}); err == nil {
				t.Error("went on")
			}
		})
	}
}

func TestBootIsSaidOncePerBoot(t *testing.T) {
	path := filepath.Join(t.TempDir(), "boot_id")
	b := &boot{path: path}
	var out bytes.Buffer
	for _, id := range []string{"a", "a", "b"} {
		if err := os.WriteFile(path, []byte(id+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := b.round(&out); err != nil {
			t.Fatal(err)
		}
	}
	if out.String() != "boot a\nboot b\n" {
		t.Errorf("printed %q", out.String())
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := b.round(&out); err != nil {
		t.Errorf("without /proc: %v", err)
	}
	if err := (&boot{path: path}).round(&out); err == nil {
		t.Error("it began without a boot id")
	}
}

func TestTicks(t *testing.T) {
	for name, c := range map[string]struct {
		lines []string
		want  int
		fails bool
	}{
		"numbers and boots": {[]string{"boot a", "tick 1 file 1 shm 1", "boot b", "tick 2 file 2 shm 2"}, 2, false},
		"no agreement":      {[]string{"tick 1 file 1 shm 0"}, 0, true},
		"broken":            {[]string{"tick 1 file 1 shm 1", "broken: memory has 1"}, 1, true},
		"half a line":       {[]string{"tick 1 fi"}, 0, true},
	} {
		t.Run(name, func(t *testing.T) {
			have, err := Ticks(c.lines)
			if len(have) != c.want || (err != nil) != c.fails {
				t.Errorf("gave %v, error %v", have, err)
			}
		})
	}
}
