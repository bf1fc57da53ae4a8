// SPDX-License-Identifier: Apache-2.0

package budget

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestLimits(t *testing.T) {
	l := Limits{Files: 3, Bytes: 10}
	for _, size := range []int64{4, 6} {
		if err := l.Take(size); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Take(1); !errors.Is(err, ErrExceeded) || !strings.Contains(err.Error(), "max_image_bytes") {
		t.Errorf("a byte too many: %v", err)
	}
	if err := l.Take(0); !errors.Is(err, ErrExceeded) || !strings.Contains(err.Error(), "max_image_files") {
		t.Errorf("a file too many: %v", err)
	}
	if err := (&Limits{Files: 1, Bytes: 10}).Take(-1); !errors.Is(err, ErrExceeded) {
		t.Errorf("a negative size: %v", err)
	}
}

// small mounts a file system of 64 MiB with 8 inodes.
func small(t *testing.T, options string) *os.File {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("budget", dir, "tmpfs", 0, options); err != nil {
		t.Skip("needs to mount: ", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func TestRoom(t *testing.T) {
	dir := small(t, "size=64m")
	write := func(room *Room, n int64) error {
		if err := room.Take(n); err != nil {
			return err
		}
		f, err := os.OpenFile(filepath.Join(dir.Name(), "f"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		_, err = f.Write(bytes.Repeat([]byte("x"), int(n)))
		return err
	}
	fill := func(reserve int64) (total int64) {
		t.Helper()
		room := NewRoom(dir, reserve)
		for {
			err := write(room, 1<<20)
			if err != nil {
				if full := new(FullError); !errors.As(err, &full) || !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), dir.Name()) {
					t.Errorf("full: %v", err)
				}
				return total
			}
			total += 1 << 20
		}
	}
	if total := fill(1 << 30); total != 60<<20 { // a twentieth of 64 MiB, in whole MiB
		t.Errorf("%d MiB were written, beside a reserve of a twentieth", total>>20)
	}
	if total := fill(2 << 20); total != 2<<20 {
		t.Errorf("%d MiB were written, beside a reserve of 2 MiB", total>>20)
	}
	if total := fill(0); total != 2<<20 {
		t.Errorf("%d MiB were written without a reserve", total>>20)
	}
}

func TestRoomForFiles(t *testing.T) {
	dir := small(t, "size=64m,nr_inodes=100")
	room := NewRoom(dir, 1<<20)
	for i := range 100 {
		if err := room.Check(0); err != nil {
			if !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "inodes") || i < 90 {
				t.Errorf("after %d files: %v", i, err)
			}
			return
		}
		if err := os.WriteFile(filepath.Join(dir.Name(), strings.Repeat("f", i+1)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Error("all inodes were taken")
}

func TestReaderEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	r := Reader(ctx, neverEnding{})
	if _, err := io.ReadFull(r, make([]byte, 100)); err != nil {
		t.Fatal(err)
	}
	why := errors.New("enough")
	cancel(why)
	if _, err := io.Copy(io.Discard, r); !errors.Is(err, why) {
		t.Errorf("error %v", err)
	}
}

// neverEnding is a source of zeros.
type neverEnding struct{}

func (neverEnding) Read(p []byte) (int, error) { return len(p), nil }

func TestExpansion(t *testing.T) {
	e := &Expansion{}
	if _, err := io.Copy(io.Discard, e.In(strings.NewReader("0123456789"))); err != nil {
		t.Fatal(err)
	}
	n, err := io.Copy(io.Discard, e.Out(neverEnding{}))
	if most := int64(freeExpansion + 10*maxRatio); !errors.Is(err, ErrExceeded) || n > most || n < most-1<<20 {
		t.Errorf("10 bytes expand to %d: %v", n, err)
	}
}

func TestSparseWriter(t *testing.T) {
	data := func(s string, n int) string { return strings.Repeat(s, n) }
	for name, tc := range map[string]struct {
		content string
		// blocks are those of a file system whose blocks are no larger than a hole.
		blocks int64
	}{
		"nothing":                    {"", 0},
		"zeros":                      {data("\x00", 10*hole), 0},
		"zeros that end in a block":  {data("\x00", 10*hole+5), 0},
		"data":                       {data("x", 3*hole), 3},
		"data, a hole, data":         {data("x", hole) + data("\x00", 5*hole) + data("y", 10), 2},
		"a hole, data, a hole":       {data("\x00", 2*hole) + "x" + data("\x00", 2*hole-1), 1},
		"zeros in the midst of data": {"x" + data("\x00", hole-2) + "y", 1},
	} {
		for _, piece := range []int{1 << 20, 1 << 10, hole + 1} {
			t.Run(name, func(t *testing.T) {
				f, err := os.Create(filepath.Join(t.TempDir(), "f"))
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				dir, err := os.Open(filepath.Dir(f.Name()))
				if err != nil {
					t.Fatal(err)
				}
				defer dir.Close()
				w := NewSparseWriter(f, NewRoom(dir, 0))
				for rest := tc.content; rest != ""; {
					n, err := w.Write([]byte(rest[:min(piece, len(rest))]))
					if err != nil {
						t.Fatal(err)
					}
					rest = rest[n:]
				}
				if err := w.Finish(); err != nil {
					t.Fatal(err)
				}
				got, err := os.ReadFile(f.Name())
				if err != nil {
					t.Fatal(err)
				}
				if string(got) != tc.content {
					t.Errorf("%d bytes that are not those of the %d", len(got), len(tc.content))
				}
				var st unix.Stat_t
				if err := unix.Fstat(int(f.Fd()), &st); err != nil {
					t.Fatal(err)
				}
				if st.Blocks*512 > tc.blocks*hole {
					t.Errorf("it occupies %d bytes, want no more than %d", st.Blocks*512, tc.blocks*hole)
				}
			})
		}
	}
}
