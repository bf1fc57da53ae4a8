package rawfile

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

func TestRead(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	for _, size := range []int{0, 1, 2047, 2048, 2049, 100000} {
		want := bytes.Repeat([]byte{'x'}, size)
		if err := os.WriteFile(path, want, 0o600); err != nil {
			t.Fatal(err)
		}
		if data, err := Read(path); err != nil || !bytes.Equal(data, want) {
			t.Errorf("%d bytes of %d, %v", len(data), size, err)
		}
	}
	if data, err := Read("/proc/self/cmdline"); err != nil || len(data) == 0 {
		t.Errorf("of /proc: %q, %v", data, err)
	}
	if _, err := Read(path + "-missing"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("of a missing file: %v", err)
	}
}
