// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"archive/tar"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// The archive is GNU tar's own, with what is special about shared memory:
// holes.
func TestRestoreShmReadsWhatTarWrote(t *testing.T) {
	src, dst, archive := t.TempDir(), t.TempDir(), filepath.Join(t.TempDir(), "dev-shm.tar")
	sparse := filepath.Join(src, "segment")
	if err := os.WriteFile(sparse, []byte("head"), 0o640); err != nil {
		t.Fatal(err)
	}
	const size = 8 << 20
	if err := os.Truncate(sparse, size); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(sparse, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("tail"), size-4); err != nil {
		t.Fatal(err)
	}
	f.Close()
	if err := os.Mkdir(filepath.Join(src, "dir"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, step := range []error{
		os.Link(sparse, filepath.Join(src, "dir", "other-name")),
		os.Symlink("segment", filepath.Join(src, "link")),
		unix.Mkfifo(filepath.Join(src, "fifo"), 0o600),
		os.WriteFile(filepath.Join(dst, "kept"), []byte("another container's"), 0o600),
		os.WriteFile(filepath.Join(src, "kept"), []byte("from the image set"), 0o600),
	} {
		if step != nil {
			t.Fatal(step)
		}
	}
	out, err := exec.Command("tar", "--create", "--file", archive, "--format=pax", "--sparse", "--numeric-owner", "--directory", src, ".").CombinedOutput()
	if err != nil {
		t.Fatalf("tar: %v: %s", err, out)
	}
	if err := restoreShm(dst, archive); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(dst, "segment"))
	if err != nil {
		t.Fatal(err)
	}
	if len(data) != size || string(data[:4]) != "head" || string(data[size-4:]) != "tail" {
		t.Errorf("segment has %d bytes, starts %q", len(data), data[:4])
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(dst, "segment"), &st); err != nil {
		t.Fatal(err)
	}
	if st.Mode&0o777 != 0o640 || st.Nlink != 2 || st.Blocks*512 > size/2 {
		t.Errorf("segment: mode %o, %d links, %d bytes on disk", st.Mode&0o777, st.Nlink, st.Blocks*512)
	}
	if link, err := os.Readlink(filepath.Join(dst, "link")); err != nil || link != "segment" {
		t.Errorf("link = %q, %v", link, err)
	}
	if st, err := os.Lstat(filepath.Join(dst, "fifo")); err != nil || st.Mode()&fs.ModeNamedPipe == 0 {
		t.Errorf("fifo: %v, %v", st, err)
	}
	if kept, err := os.ReadFile(filepath.Join(dst, "kept")); err != nil || string(kept) != "another container's" {
		t.Errorf("kept = %q, %v", kept, err)
	}
}

// The containers of a pod have one /dev/shm. The first that is restored brings
// all files, those of others among them, and the next only what is missing.
func TestRestoreShmTwice(t *testing.T) {
	dst := t.TempDir()
	for _, archive := range []string{
		writeShm(t, shmFile{"shared", "of the first"}, shmFile{"dir/first", "1"}),
		writeShm(t, shmFile{"shared", "of the second, which is longer"}, shmFile{"dir/first", "changed"}, shmFile{"dir/second", "2"}, shmFile{"own", "3"}),
	} {
		if err := restoreShm(dst, archive); err != nil {
			t.Fatal(err)
		}
	}
	for name, want := range map[string]string{"shared": "of the first", "dir/first": "1", "dir/second": "2", "own": "3"} {
		if got, err := os.ReadFile(filepath.Join(dst, name)); err != nil || string(got) != want {
			t.Errorf("%s = %q, %v, want %q", name, got, err, want)
		}
	}
}

type shmFile struct{ name, content string }

// writeShm makes an archive of files and the directory "dir".
func writeShm(t *testing.T, files ...shmFile) string {
	t.Helper()
	src, archive := t.TempDir(), filepath.Join(t.TempDir(), "dev-shm.tar")
	if err := os.Mkdir(filepath.Join(src, "dir"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if err := os.WriteFile(filepath.Join(src, f.name), []byte(f.content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	out, err := exec.Command("tar", "--create", "--file", archive, "--format=pax", "--sparse", "--numeric-owner", "--directory", src, ".").CombinedOutput()
	if err != nil {
		t.Fatalf("tar: %v: %s", err, out)
	}
	return archive
}

// Whoever made the archive cannot reach out of /dev/shm with it, nor bring a
// device or a set-id file.
func TestRestoreShmIsConfined(t *testing.T) {
	outside := t.TempDir()
	for name, entries := range map[string][]tar.Header{
		"dot dot":            {{Name: "../escaped", Typeflag: tar.TypeReg}},
		"absolute":           {{Name: outside + "/escaped", Typeflag: tar.TypeReg}},
		"through a symlink":  {{Name: "out", Linkname: outside, Typeflag: tar.TypeSymlink}, {Name: "out/escaped", Typeflag: tar.TypeReg}},
		"hard link to other": {{Name: "passwd", Linkname: "../../../../etc/passwd", Typeflag: tar.TypeLink}},
	} {
		t.Run(name, func(t *testing.T) {
			dst := t.TempDir()
			if err := restoreShm(dst, writeTar(t, entries)); err == nil {
				t.Error("restoreShm took it")
			}
			if entries, _ := os.ReadDir(outside); len(entries) > 0 {
				t.Errorf("left %v outside", entries)
			}
			if _, err := os.Stat(filepath.Join(filepath.Dir(dst), "escaped")); err == nil {
				t.Error("left a file outside")
			}
		})
	}
	t.Run("device and set-id", func(t *testing.T) {
		dst := t.TempDir()
		archive := writeTar(t, []tar.Header{
			{Name: "null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3},
			{Name: "suid", Typeflag: tar.TypeReg, Mode: 0o6755, Uid: os.Getuid(), Gid: os.Getgid()},
		})
		if err := restoreShm(dst, archive); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Lstat(filepath.Join(dst, "null")); err == nil {
			t.Error("made a device")
		}
		st, err := os.Stat(filepath.Join(dst, "suid"))
		if err != nil || st.Mode()&(fs.ModeSetuid|fs.ModeSetgid) != 0 {
			t.Errorf("suid: %v, %v", st, err)
		}
	})
}

func writeTar(t *testing.T, entries []tar.Header) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "archive.tar")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := tar.NewWriter(f)
	for _, h := range entries {
		if h.Mode == 0 {
			h.Mode = 0o644
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(path)
}
