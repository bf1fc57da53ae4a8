// SPDX-License-Identifier: Apache-2.0

package imageset

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// What is accepted as a manifest is accepted again as it is written, names flat
// files, and has sizes that add up.
func FuzzReadManifest(f *testing.F) {
	f.Add([]byte(`{"formatVersion":1,"files":[{"name":"inventory.img","size":0,"blake3":"` + digest("") + `"}]}`))
	f.Add([]byte(`{"formatVersion":1,"created":"2026-01-01T00:00:00Z","container":{"id":"c","namespace":"n","args":["sh"],"mounts":["/data"],"hostname":"h"},
		"guest":{"kernel":"6.1","criuVersion":40201,"cpuFeatures":["fpu"]},"options":{"fileLocks":true},"externals":[{"name":"m0","destination":"/data","fsType":"virtiofs"}],
		"stdio":[{"fd":1,"key":"pipe:[7]"}],"connections":[{"local":"1.2.3.4:5","remote":"[::1]:6"}],"addresses":[{"interface":"eth0","address":"1.2.3.4"}],
		"openFiles":[{"path":"/data/f","size":1}],"phases":[{"name":"dump","nanoseconds":1}],
		"files":[{"name":"inventory.img","size":9223372036854775807,"blake3":"` + digest("") + `"},{"name":"core-1.img","size":1,"blake3":"` + digest("") + `"}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := ReadManifest(bytes.NewReader(data))
		if err != nil {
			return
		}
		for _, file := range m.Files {
			if checkName(file.Name) != nil || file.Size < 0 || strings.ContainsAny(file.Name, "/\x00") {
				t.Errorf("file %q of %d bytes", file.Name, file.Size)
			}
		}
		if m.Bytes() < 0 {
			t.Errorf("%d bytes in all", m.Bytes())
		}
		again, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ReadManifest(bytes.NewReader(again)); err != nil {
			t.Errorf("written again, it is refused: %v", err)
		}
	})
}

// What an image set is copied to has the digests of its manifest, whatever its
// directory holds.
func FuzzOpen(f *testing.F) {
	f.Add("inventory.img", "inventory", "pages-1.img", "pages", "", uint8(0))
	f.Add("inventory.img", "inventory", "pages-1.img", "pages", "more.img", uint8(1))
	f.Add("inventory.img", "inventory", "pages-1.img", "", "inventory.img", uint8(2))
	f.Add("inventory.img", "", "../x.img", "pages", "core-1.img", uint8(3))
	f.Fuzz(func(t *testing.T, one, oneContent, two, twoContent, third string, kind uint8) {
		dir := t.TempDir()
		set := filepath.Join(dir, "set")
		if err := os.Mkdir(set, 0o700); err != nil {
			t.Fatal(err)
		}
		m := &Manifest{FormatVersion: FormatVersion}
		for name, content := range map[string]string{one: oneContent, two: twoContent} {
			m.Files = append(m.Files, File{Name: name, Size: int64(len(content)), BLAKE3: digest(content)})
			if filepath.IsLocal(name) {
				_ = os.WriteFile(filepath.Join(set, name), []byte(content), 0o600) // where there can be such a name
			}
		}
		data, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(set, ManifestName), data, 0o600); err != nil {
			t.Fatal(err)
		}
		if filepath.IsLocal(third) && third != ManifestName {
			path := filepath.Join(set, third)
			os.Remove(path)
			switch kind % 4 {
			case 0:
				err = os.WriteFile(path, []byte("other"), 0o600)
			case 1:
				err = os.Symlink("/etc/passwd", path)
			case 2:
				err = unix.Mkfifo(path, 0o600)
			case 3:
				err = os.Mkdir(path, 0o700)
			}
			if err != nil {
				t.Skip(err)
			}
		}
		s, err := Open(set)
		if err != nil {
			return
		}
		defer s.Close()
		to := filepath.Join(dir, "stage")
		if err := s.CopyTo(t.Context(), to, Limits{Files: 9, Bytes: 1 << 20}); err != nil {
			if _, serr := os.Lstat(to); serr == nil {
				t.Error("a copy that failed is left")
			}
			return
		}
		for _, file := range s.Manifest.Files {
			content, err := os.ReadFile(filepath.Join(to, file.Name))
			if err != nil || digest(string(content)) != file.BLAKE3 {
				t.Errorf("%s: %d bytes, %v", file.Name, len(content), err)
			}
		}
		if got := names(t, to); len(got) != len(s.Manifest.Files) {
			t.Errorf("copied %q", got)
		}
	})
}

// A guest does as each byte says, while its images are followed. What is
// collected are its regular files, with their digests.
func FuzzFollow(f *testing.F) {
	f.Add([]byte{0, 1, 2, 3, 4, 5, 6, 7, 8, 9})
	f.Add([]byte{0, 0, 0, 10, 20, 30, 40})
	f.Add([]byte{1, 11, 21, 31, 2, 12, 22, 9, 19})
	f.Fuzz(func(t *testing.T, deeds []byte) {
		if len(deeds) > 64 {
			t.Skip("long")
		}
		exchange, to := t.TempDir(), t.TempDir()
		dir := filepath.Join(exchange, "images")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		dst, err := os.Open(to)
		if err != nil {
			t.Fatal(err)
		}
		defer dst.Close()
		limits := Limits{Files: 6, Bytes: 4 * followFrom}
		follower := Follow(exchange, "images", dst, limits)
		defer follower.Stop()
		for i, deed := range deeds {
			path := filepath.Join(dir, fmt.Sprintf("pages-%d.img", deed/10%4))
			other := filepath.Join(dir, fmt.Sprintf("pages-%d.img", (deed/10+1)%4))
			switch deed % 10 { // each may fail
			case 0, 1:
				// It may be a FIFO, which nobody reads.
				if f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|unix.O_NONBLOCK, 0o600); err == nil {
					_, _ = f.Write(bytes.Repeat([]byte{byte(i)}, followFrom+int(deed)))
					f.Close()
				}
			case 2:
				_ = os.Truncate(path, int64(deed)*1000)
			case 3:
				_ = os.Truncate(path, 2*followFrom)
			case 4:
				_ = os.Rename(path, other)
			case 5:
				_ = unix.Renameat2(unix.AT_FDCWD, path, unix.AT_FDCWD, other, unix.RENAME_EXCHANGE)
			case 6:
				os.Remove(path)
			case 7:
				_ = os.Symlink(other, path)
			case 8:
				_ = unix.Mkfifo(path, 0o600)
			case 9:
				_ = os.Link(path, other)
			}
		}
		files, err := follower.Collect(t.Context())
		if err != nil {
			return
		}
		if len(files) > limits.Files {
			t.Errorf("%d files", len(files))
		}
		for _, file := range files {
			st, err := os.Lstat(filepath.Join(dir, file.Name))
			if err != nil || !st.Mode().IsRegular() {
				t.Errorf("%s: %v, %v", file.Name, st, err)
			}
			content, err := os.ReadFile(filepath.Join(to, file.Name))
			if err != nil || int64(len(content)) != file.Size || digest(string(content)) != file.BLAKE3 {
				t.Errorf("%s: %d bytes of %d, %v", file.Name, len(content), file.Size, err)
			}
		}
		if got := names(t, to); len(got) != len(files) {
			t.Errorf("there is %q, of %v", got, files)
		}
	})
}
