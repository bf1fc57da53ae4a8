// SPDX-License-Identifier: Apache-2.0

package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
)

// vast writes an archive whose only entry is a hole of so many bytes.
func vast(t *testing.T, name string, size int64) (dir, archive string) {
	t.Helper()
	var head bytes.Buffer
	if err := tar.NewWriter(&head).WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o600, Size: size}); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "x.tar")
	if err := os.WriteFile(path, head.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, int64(head.Len())+size+1024); err != nil {
		t.Fatal(err)
	}
	return filepath.Dir(path), filepath.Base(path)
}

// An entry may be as long as it likes: neither reading nor skipping it outlasts
// the caller.
func TestExtractEndsWithItsContext(t *testing.T) {
	for _, name := range []string{"container.log", "checkpoint/pages-1.img"} {
		t.Run(name, func(t *testing.T) {
			dir, archive := vast(t, name, 1<<40)
			target, why := t.TempDir(), errors.New("enough")
			ctx, cancel := context.WithTimeoutCause(t.Context(), 50*time.Millisecond, why)
			defer cancel()
			done := make(chan error, 1)
			go func() { done <- Extract(ctx, dir, archive, target, imageset.Limits{Files: 9, Bytes: 1 << 41}) }()
			select {
			case err := <-done:
				if !errors.Is(err, why) {
					t.Errorf("error %v", err)
				}
			case <-time.After(20 * time.Second):
				t.Fatal("it does not end")
			}
		})
	}
}

func blocks(t *testing.T, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks
}

// A hole in an archive needs no block, but counts.
func TestExtractKeepsHoles(t *testing.T) {
	const size = 1 << 30
	from := t.TempDir()
	if err := os.Mkdir(filepath.Join(from, "checkpoint"), 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(from, "checkpoint", "pages-1.img")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "tar", "--create", "--sparse", "--format=posix", "--file=x.tar", "checkpoint")
	cmd.Dir = from
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Skipf("needs GNU tar: %v: %s", err, out)
	}
	target := t.TempDir()
	if err := Extract(t.Context(), from, "x.tar", target, imageset.Limits{Files: 9, Bytes: size}); err != nil {
		t.Fatal(err)
	}
	got := filepath.Join(target, "checkpoint", "pages-1.img")
	if st, err := os.Stat(got); err != nil || st.Size() != size || blocks(t, got) != 0 {
		t.Errorf("%v, %v, %d blocks", st, err, blocks(t, got))
	}
	if err := Extract(t.Context(), from, "x.tar", t.TempDir(), imageset.Limits{Files: 9, Bytes: size - 1}); err == nil || !strings.Contains(err.Error(), "max_image_bytes") {
		t.Errorf("a byte more than allowed: %v", err)
	}
}

func TestExtractLeavesTheReserve(t *testing.T) {
	target := t.TempDir()
	if err := unix.Mount("archive", target, "tmpfs", 0, "size=8m"); err != nil {
		t.Skip("needs to mount: ", err)
	}
	defer unix.Unmount(target, unix.MNT_DETACH) //nolint:errcheck // a test's
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "x.tar"), archiveOf(t, reg("checkpoint/pages-1.img", strings.Repeat("p", 7<<20))), 0o600); err != nil {
		t.Fatal(err)
	}
	err := Extract(t.Context(), dir, "x.tar", target, imageset.Limits{Files: 9, Bytes: 1 << 30, Reserve: 400 << 10})
	if err != nil {
		t.Errorf("with a reserve that is left: %v", err)
	}
	if err := os.RemoveAll(filepath.Join(target, "checkpoint")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(target, "other"), bytes.Repeat([]byte("x"), 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	err = Extract(t.Context(), dir, "x.tar", target, imageset.Limits{Files: 9, Bytes: 1 << 30, Reserve: 400 << 10})
	if !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "reserve_bytes") || !strings.Contains(err.Error(), target) {
		t.Errorf("with less room: %v", err)
	}
}

func zstdOf(t *testing.T, window int, write func(io.Writer) error) []byte {
	t.Helper()
	var buf bytes.Buffer
	w, err := zstd.NewWriter(&buf, zstd.WithWindowSize(window), zstd.WithEncoderConcurrency(1))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(write(w), w.Close()); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func TestDecompress(t *testing.T) {
	zeros := make([]byte, 1<<20)
	for name, tc := range map[string]struct {
		data []byte
		size int64
		err  string
	}{
		"not compressed": {data: []byte("content"), size: 7},
		"nothing":        {},
		"gzip":           {data: gzipped(t, []byte("content")), size: 7},
		"zstd":           {data: zstdOf(t, 1<<20, func(w io.Writer) error { _, err := w.Write([]byte("content")); return err }), size: 7},
		"memory that was never used": {data: zstdOf(t, 1<<20, func(w io.Writer) (err error) {
			for range 900 {
				_, err = w.Write(zeros)
			}
			return err
		}), size: 900 << 20},
		"a bomb": {data: zstdOf(t, 1<<20, func(w io.Writer) (err error) {
			for range 3000 {
				_, err = w.Write(zeros)
			}
			return err
		}), err: "larger than allowed"},
		// A frame's header is enough: RFC 8878, 3.1.1.1.
		"a window of 512 MiB": {data: []byte{0x28, 0xb5, 0x2f, 0xfd, 0, 19 << 3, 1, 0, 0}, err: "window size"},
	} {
		t.Run(name, func(t *testing.T) {
			r, err := Decompress(t.Context(), bytes.NewReader(tc.data))
			if err != nil {
				t.Fatal(err)
			}
			n, err := io.Copy(io.Discard, r)
			if tc.err != "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) {
					t.Errorf("error %v after %d bytes, want one with %q", err, n, tc.err)
				}
			} else if err != nil || n != tc.size {
				t.Errorf("%d bytes, %v; want %d", n, err, tc.size)
			}
			if err := r.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}
