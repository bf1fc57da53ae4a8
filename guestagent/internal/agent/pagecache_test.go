// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"os"
	"path/filepath"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// cached is how many of a file's pages are in the page cache.
func cached(t *testing.T, path string) (n int) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	data, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(data) }()
	in := make([]byte, (len(data)+os.Getpagesize()-1)/os.Getpagesize())
	if _, _, err := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&data[0])), uintptr(len(data)), uintptr(unsafe.Pointer(&in[0]))); err != 0 {
		t.Fatal(err)
	}
	for _, page := range in {
		n += int(page & 1)
	}
	return n
}

func TestImagesAreDroppedFromThePageCache(t *testing.T) {
	dir := t.TempDir()
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	if st.Type == unix.TMPFS_MAGIC {
		t.Skip("TMPDIR is in the page cache")
	}
	write := func(path string, size int) {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.Write(make([]byte, size)); err != nil {
			t.Fatal(err)
		}
		if err := f.Sync(); err != nil { // virtiofs has none that is dirty
			t.Fatal(err)
		}
	}
	pages, small, other := filepath.Join(dir, "pages-1.img"), filepath.Join(dir, "pages-2.img"), filepath.Join(dir, "files.img")
	const piece = 2 << 20
	defer dropBehind(dir, piece)()
	write(pages, piece)
	write(small, piece-1)
	write(other, piece)
	eventually := func(what string) {
		t.Helper()
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for late := time.After(time.Minute); cached(t, pages) > 0; {
			select {
			case <-tick.C:
			case <-late:
				t.Fatalf("%s %d pages are cached", what, cached(t, pages))
			}
		}
	}
	eventually("while it is written")
	write(pages, piece)
	eventually("and once more")
	if cached(t, small) == 0 || cached(t, other) == 0 {
		t.Error("files are dropped for which it is not worth it")
	}
}
