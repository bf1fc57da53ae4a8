// SPDX-License-Identifier: Apache-2.0

package kata

import (
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestSweepRemovesOnlyWhatIsEmpty(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "sb")
	for _, d := range []string{"rw/passthrough/sb/rootfs", "rw/kept", "outside"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write := func(name, content string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("rw/passthrough/hosts", "")
	socket, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "outside", "s")})
	if err != nil {
		t.Fatal(err)
	}
	socket.SetUnlinkOnClose(false)
	socket.Close()
	write("rw/kept/data", "x")
	if err := os.Symlink("/etc", filepath.Join(dir, "outside", "link")); err != nil {
		t.Fatal(err)
	}
	if err := sweep(dir); err != nil {
		t.Fatal(err)
	}
	var left []string
	_ = filepath.WalkDir(dir, func(path string, _ os.DirEntry, _ error) error {
		rel, _ := filepath.Rel(dir, path)
		left = append(left, rel)
		return nil
	})
	want := []string{".", "outside", "outside/link", "rw", "rw/kept", "rw/kept/data"}
	if len(left) != len(want) {
		t.Fatalf("left: %q, want %q", left, want)
	}
	for i := range want {
		if left[i] != want[i] {
			t.Errorf("left: %q, want %q", left, want)
		}
	}

	empty := filepath.Join(t.TempDir(), "sb")
	if err := os.MkdirAll(filepath.Join(empty, "shared", "c"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := sweep(empty); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(empty); !os.IsNotExist(err) {
		t.Errorf("%s is still there: %v", empty, err)
	}
	if err := sweep(empty); err != nil {
		t.Errorf("nothing to sweep: %v", err)
	}
}

func TestSweepMount(t *testing.T) {
	dir := t.TempDir()
	for name, content := range map[string]string{
		"c-0123456789abcdef-.helper": "", "c-fedcba9876543210-.helper": "",
		"c-0123456789abcdef-hosts": "", "d-0123456789abcdef-.helper": "", "c-2-0123456789abcdef-.helper": "", "c-1111111111111111-.helper": "mounted",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := sweepMount(dir, "c", "/dev/.helper"); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var left []string
	for _, e := range entries {
		left = append(left, e.Name())
	}
	if want := []string{"c-0123456789abcdef-hosts", "c-1111111111111111-.helper", "c-2-0123456789abcdef-.helper", "d-0123456789abcdef-.helper"}; !slices.Equal(left, want) {
		t.Errorf("left: %q, want %q", left, want)
	}
	if err := sweepMount(filepath.Join(dir, "missing"), "c", "/dev/.helper"); err != nil {
		t.Errorf("nothing to sweep: %v", err)
	}
}
