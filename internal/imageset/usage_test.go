// SPDX-License-Identifier: Apache-2.0

package imageset

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/budget"
)

func TestCheckUsage(t *testing.T) {
	limits := Limits{Files: 10, Bytes: 1 << 20}
	for name, tc := range map[string]struct {
		make func(t *testing.T, dir string)
		err  string
	}{
		"nothing": {make: func(*testing.T, string) {}},
		"a few": {make: func(t *testing.T, dir string) {
			write(t, filepath.Join(dir, "images", "a"), strings.Repeat("a", 1<<18))
		}},
		"a hole": {make: func(t *testing.T, dir string) { vast(t, filepath.Join(dir, "images", "a"), 1<<30) }},
		"too large": {make: func(t *testing.T, dir string) {
			write(t, filepath.Join(dir, "images", "a"), strings.Repeat("a", 2<<20))
		}, err: "max_image_bytes"},
		"too large beside the images": {make: func(t *testing.T, dir string) { write(t, filepath.Join(dir, "a"), strings.Repeat("a", 2<<20)) }, err: "max_image_bytes"},
		"too many, of any kind": {make: func(t *testing.T, dir string) {
			for i := range 10 {
				if err := unix.Mkfifo(filepath.Join(dir, "images", fmt.Sprint(i)), 0o600); err != nil {
					t.Fatal(err)
				}
			}
		}, err: "max_image_files"},
		"too deep": {make: func(t *testing.T, dir string) {
			if err := os.Mkdir(filepath.Join(dir, "images", "more"), 0o700); err != nil {
				t.Fatal(err)
			}
		}, err: "flat"},
		"a link elsewhere": {make: func(t *testing.T, dir string) {
			if err := os.Symlink("/", filepath.Join(dir, "root")); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.Mkdir(filepath.Join(dir, "images"), 0o700); err != nil {
				t.Fatal(err)
			}
			tc.make(t, dir)
			switch err := CheckUsage(t.Context(), dir, limits); {
			case tc.err != "":
				wantError(t, err, tc.err)
			case err != nil:
				t.Error(err)
			}
		})
	}
	if err := CheckUsage(t.Context(), filepath.Join(t.TempDir(), "none"), limits); err != nil {
		t.Errorf("no directory: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	dir := t.TempDir()
	write(t, filepath.Join(dir, "a"), "")
	if err := CheckUsage(ctx, dir, limits); !errors.Is(err, context.Canceled) {
		t.Errorf("after its context: %v", err)
	}
}

// A guest that exchanges a directory with a FIFO has nobody open it.
func TestCheckUsageOpensDirectoriesOnly(t *testing.T) {
	dir := t.TempDir()
	images, fifo := filepath.Join(dir, "images"), filepath.Join(dir, "fifo")
	if err := os.Mkdir(images, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	opens := watch(t, fifo)
	defer exchanging(t, images, fifo)()
	for range 2000 {
		if err := CheckUsage(t.Context(), dir, roomy); err != nil {
			t.Fatal(err)
		}
	}
	if n := opens(); n > 0 {
		t.Errorf("the FIFO was opened %d times", n)
	}
}

func TestCheckUsageOfAFullDisk(t *testing.T) {
	small := t.TempDir()
	if err := unix.Mount("imageset", small, "tmpfs", 0, "size=4m"); err != nil {
		t.Skip("needs to mount: ", err)
	}
	defer unix.Unmount(small, unix.MNT_DETACH)                   //nolint:errcheck // a test's
	limits := Limits{Files: 9, Bytes: 1 << 30, Reserve: 1 << 30} // a twentieth of 4 MiB
	write(t, filepath.Join(small, "other"), strings.Repeat("x", 3<<20))
	if err := CheckUsage(t.Context(), small, limits); err != nil {
		t.Error(err)
	}
	write(t, filepath.Join(small, "more"), strings.Repeat("x", 900<<10))
	if err := CheckUsage(t.Context(), small, limits); !errors.As(err, new(*budget.FullError)) {
		t.Errorf("error %v", err)
	}
}
