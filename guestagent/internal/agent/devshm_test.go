// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
	"github.com/kata-checkpoint/kata-checkpoint/internal/testproc"
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
	if err := restoreShm(t.Context(), directory(t, dst), archive); err != nil {
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
func TestIsEmptyShm(t *testing.T) {
	for name, tc := range map[string]struct {
		files []string
		empty bool
	}{
		"nothing":                      {nil, true},
		"links of CRIU's":              {[]string{"link_remap.1", "link_remap.23"}, true},
		"a segment":                    {[]string{"segment"}, false},
		"a segment beside links":       {[]string{"link_remap.1", "segment"}, false},
		"a name like that of a link":   {[]string{"link_remap.1a"}, false},
		"a hidden file (a semaphore)":  {[]string{".hidden"}, false},
		"a directory with nothing":     {[]string{"dir/"}, false},
		"more than are read at a time": {append(many("link_remap.", 200), "segment"), false},
	} {
		dir := t.TempDir()
		for _, file := range tc.files {
			path := filepath.Join(dir, file)
			var err error
			if strings.HasSuffix(file, "/") {
				err = os.Mkdir(path, 0o700)
			} else {
				err = os.WriteFile(path, nil, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		shm := directory(t, dir)
		for range 2 { // the descriptor itself is not read
			if empty, err := isEmptyShm(shm); err != nil || empty != tc.empty {
				t.Errorf("%s: %v, %v", name, empty, err)
			}
		}
	}
	archive := filepath.Join(t.TempDir(), "dev-shm.tar")
	if err := os.WriteFile(archive, emptyArchive, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := restoreShm(t.Context(), directory(t, t.TempDir()), archive); err != nil {
		t.Errorf("an empty archive: %v", err)
	}
}

func many(prefix string, n int) (names []string) {
	for i := range n {
		names = append(names, prefix+strconv.Itoa(i))
	}
	return names
}

func TestRestoreShmTwice(t *testing.T) {
	dst := t.TempDir()
	for _, archive := range []string{
		writeShm(t, shmFile{"shared", "of the first"}, shmFile{"dir/first", "1"}),
		writeShm(t, shmFile{"shared", "of the second, which is longer"}, shmFile{"dir/first", "changed"}, shmFile{"dir/second", "2"}, shmFile{"own", "3"}),
	} {
		if err := restoreShm(t.Context(), directory(t, dst), archive); err != nil {
			t.Fatal(err)
		}
	}
	for name, want := range map[string]string{"shared": "of the first", "dir/first": "1", "dir/second": "2", "own": "3"} {
		if got, err := os.ReadFile(filepath.Join(dst, name)); err != nil || string(got) != want {
			t.Errorf("%s = %q, %v, want %q", name, got, err, want)
		}
	}
}

// directory opens a directory as a path.
func directory(t *testing.T, path string) *os.File {
	t.Helper()
	fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), path)
	t.Cleanup(func() { f.Close() })
	return f
}

// holes is an archive in GNU tar's sparse format of a file of a size with some
// parts of data. The list of parts is written as it is given.
func holes(t testing.TB, size int64, list, data string) string {
	t.Helper()
	pad := func(s string) string { return s + strings.Repeat("\x00", -len(s)&(blockSize-1)) }
	pax := func(key, value string) string {
		for n := len(key) + len(value) + 3; ; n++ {
			if s := fmt.Sprintf("%d %s=%s\n", n, key, value); len(s) == n {
				return s
			}
		}
	}
	header := func(name string, kind byte, size int) string {
		b := make([]byte, blockSize)
		copy(b, name)
		copy(b[100:], "0000600\x000000000\x000000000\x00")
		copy(b[124:], fmt.Sprintf("%011o\x0000000000000\x00        %c", size, kind))
		copy(b[257:], "ustar\x0000")
		sum := 0
		for _, c := range b {
			sum += int(c)
		}
		copy(b[148:], fmt.Sprintf("%06o\x00 ", sum))
		return string(b)
	}
	records := pax("GNU.sparse.major", "1") + pax("GNU.sparse.minor", "0") + pax("GNU.sparse.name", "file") + pax("GNU.sparse.realsize", strconv.FormatInt(size, 10))
	content := pad(list) + data
	archive := header("PaxHeaders.0/x", 'x', len(records)) + pad(records) + header("GNUSparseFile.0/file", '0', len(content)) + pad(content) + strings.Repeat("\x00", 2*blockSize)
	path := filepath.Join(t.TempDir(), "dev-shm.tar")
	if err := os.WriteFile(path, []byte(archive), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// smallTmpfs is a tmpfs of 1 MiB.
func smallTmpfs(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Skip("needs to mount a tmpfs: ", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

// Holes cost nothing, as many as there may be.
func TestRestoreShmOfHoles(t *testing.T) {
	const size = int64(1) << 42
	for name, tc := range map[string]struct{ list, data, err string }{
		"nothing but a hole":       {list: "0\n"},
		"data between holes":       {list: "2\n4096\n4\n4398046510080\n5\n", data: "aaaabbbbb"},
		"data beyond the end":      {list: "1\n4398046511104\n1\n", data: "a", err: "invalid tar header"},
		"overlapping data":         {list: "2\n0\n4\n2\n4\n", data: "aaaabbbb", err: "invalid tar header"},
		"more data than there are": {list: "1\n0\n1048576\n", data: "a", err: "EOF"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := smallTmpfs(t)
			begin := time.Now()
			err := restoreShm(t.Context(), directory(t, dir), holes(t, size, tc.list, tc.data))
			if took := time.Since(begin); took > 5*time.Second {
				t.Errorf("it took %s", took)
			}
			if tc.err != "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) {
					t.Errorf("error %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			f, err := os.Open(filepath.Join(dir, "file"))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if st, err := f.Stat(); err != nil || st.Size() != size {
				t.Errorf("%v, %v", st, err)
			}
			for at, want := range map[int64]string{0: "\x00\x00", 4096: "aaaa", 4398046510080: "bbbbb"} {
				got := make([]byte, len(want))
				if tc.data == "" {
					want = string(got)
				}
				if _, err := f.ReadAt(got, at); err != nil || string(got) != want {
					t.Errorf("at %d: %q, %v", at, got, err)
				}
			}
		})
	}
}

// A restore that nobody wants any longer ends.
func TestRestoreShmEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	reason := errors.New("the container was killed")
	cancel(reason)
	dir := t.TempDir()
	if err := restoreShm(ctx, directory(t, dir), writeShm(t, shmFile{"file", "content"})); !errors.Is(err, reason) {
		t.Errorf("error %v", err)
	}
	if left, _ := os.ReadDir(dir); len(left) > 0 {
		t.Errorf("it has made %v", left)
	}
}

// A container's init may be in a mount namespace of its own, in which it
// may put what it likes at /dev/shm, without any capability in the guest. What the
// container was created with is all that is opened.
func TestOnlyTheContainersOwnShmIsOpened(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("makes mount namespaces")
	}
	secret := t.TempDir()
	if err := os.WriteFile(filepath.Join(secret, "of-the-guest"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(secret, 0o755); err != nil {
		t.Fatal(err)
	}
	const tmpfs = "mount -t tmpfs tmpfs "
	for name, tc := range map[string]struct{ script, err string }{
		"its own":               {tmpfs + "/dev; mkdir /dev/shm; " + tmpfs + "/dev/shm; touch /dev/shm/file", ""},
		"a link":                {tmpfs + "/dev; ln -s " + secret + " /dev/shm", "not a directory"},
		"a link above":          {"mkdir /tmp/d; " + tmpfs + "/tmp/d; ln -s " + secret + " /tmp/d/shm; mount --bind /tmp/d /dev", "not a directory"},
		"a directory":           {tmpfs + "/dev; mkdir /dev/shm", "not what the container was created with"},
		"a bind of a directory": {tmpfs + "/dev; mkdir /dev/shm; mount --bind " + secret + " /dev/shm", "not what the container was created with"},
		"another tmpfs":         {tmpfs + "/dev; mkdir /dev/shm; " + tmpfs + "/dev/shm; " + tmpfs + "/dev/shm", "not what the container was created with"},
		"nothing":               {tmpfs + "/dev", "no such file"},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := exec.Command("unshare", "--mount", "sh", "-c", tc.script+"; echo ready; read line")
			testproc.Ready(t, cmd)
			init, err := newProcess(cmd.Process.Pid)
			if err != nil {
				t.Fatal(err)
			}
			c := &container{ID: "c1", Init: init}
			if err := c.noteMounts(); err != nil {
				t.Fatal(err)
			}
			if tc.err != "" {
				var st unix.Stat_t // it was there when the container was created
				if err := unix.Stat("/dev/shm", &st); err != nil {
					t.Skip(err)
				}
				c.Shm = &st.Dev
			}
			look, err := inspect.LookAtFiles(t.Context(), init.PID, []int{init.PID}, nil)
			if err != nil {
				t.Fatal(err)
			}
			findings, err := look.CheckShm(*c.Shm)
			if err != nil || (len(findings) == 0) != (tc.err == "") {
				t.Errorf("a checkpoint: %v, %v", findings, err)
			}
			shm, err := c.openShm(init.PID)
			if tc.err != "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) {
					t.Errorf("it was opened: %v, error %v", shm, err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer shm.Close()
			if names, err := os.ReadDir(fmt.Sprintf("/proc/self/fd/%d", shm.Fd())); err != nil || len(names) != 1 || names[0].Name() != "file" {
				t.Errorf("it has %v (%v)", names, err)
			}
		})
	}
	none := uint64(0)
	if shm, err := (&container{ID: "c1", Init: process{PID: os.Getpid()}, Shm: &none}).openShm(os.Getpid()); shm != nil || err != nil {
		t.Errorf("of a container without: %v, %v", shm, err)
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
			if err := restoreShm(t.Context(), directory(t, dst), writeTar(t, entries)); err == nil {
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
		if err := restoreShm(t.Context(), directory(t, dst), archive); err != nil {
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

func writeTar(t testing.TB, entries []tar.Header) string {
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
