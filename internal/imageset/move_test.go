// SPDX-License-Identifier: Apache-2.0

package imageset

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// A set that is moved needs no room, and is verified as one that is copied.
func TestMoveTo(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("imageset", dir, "tmpfs", 0, "size=4m"); err != nil {
		t.Skip("needs to mount: ", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	large := strings.Repeat("page", 3<<18) // 3 MiB of 4
	at := func(name, pages string) *Set {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.Mkdir(path, 0o700); err != nil {
			t.Fatal(err)
		}
		m := &Manifest{Files: []File{{Name: "inventory.img", Size: 9, BLAKE3: digest("inventory")}, {Name: "pages-1.img", Size: int64(len(large)), BLAKE3: digest(large)}}}
		write(t, filepath.Join(path, "inventory.img"), "inventory")
		write(t, filepath.Join(path, "pages-1.img"), pages)
		f, err := openDir(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return &Set{Manifest: m, dir: f}
	}

	set := at("set", large)
	gone := errors.New("the caller has gone")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(gone)
	to := filepath.Join(dir, "restore")
	if err := set.MoveTo(ctx, to); !errors.Is(err, gone) {
		t.Errorf("without a caller: %v", err)
	}
	if err := set.MoveTo(t.Context(), to); err != nil {
		t.Fatal(err)
	}
	if left, have := names(t, filepath.Join(dir, "set")), names(t, to); len(left) != 0 || len(have) != 2 {
		t.Errorf("there is left %q, and %q was moved", left, have)
	}
	if err := os.RemoveAll(to); err != nil {
		t.Fatal(err)
	}

	set = at("damaged", "P"+large[1:])
	if err := set.MoveTo(t.Context(), to); err == nil || !strings.Contains(err.Error(), "pages-1.img is damaged") {
		t.Errorf("a damaged one: %v", err)
	}
	if _, err := os.Lstat(to); !os.IsNotExist(err) {
		t.Errorf("of a damaged one there is left: %v", err)
	}
}
