// SPDX-License-Identifier: Apache-2.0

package regular

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestOpen(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	if err := os.WriteFile(path("file"), []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(path("dir"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("file", path("link")); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(path("fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, st, err := Open(unix.AT_FDCWD, path("file"), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if data, err := io.ReadAll(f); err != nil || string(data) != "content" || st.Size != int64(len(data)) {
		t.Errorf("%q of %d bytes, %v", data, st.Size, err)
	}
	for _, name := range []string{"dir", "link", "fifo"} {
		if _, _, err := Open(unix.AT_FDCWD, path(name), 0); !errors.Is(err, ErrNot) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, _, err := Open(unix.AT_FDCWD, path("none"), 0); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("none: %v", err)
	}
	top, err := os.Open(path("dir"))
	if err != nil {
		t.Fatal(err)
	}
	defer top.Close()
	if _, _, err := Open(int(top.Fd()), "../file", unix.RESOLVE_BENEATH); !errors.Is(err, unix.EXDEV) {
		t.Errorf("beneath: %v", err)
	}
}
