// SPDX-License-Identifier: Apache-2.0

package archive

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
)

func reg(name, content string) entry {
	return entry{tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o6755, Size: int64(len(content))}, content}
}

func other(name string, kind byte, link string) entry {
	return entry{tar.Header{Name: name, Typeflag: kind, Linkname: link, Mode: 0o777}, ""}
}

type entry struct {
	tar.Header
	content string
}

func archiveOf(t *testing.T, entries ...entry) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, e := range entries {
		if err := w.WriteHeader(&e.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(e.content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func gzipped(t *testing.T, data []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func TestExtract(t *testing.T) {
	whole := []entry{
		other("checkpoint/", tar.TypeDir, ""), reg("checkpoint/a.img", "A"), reg("./checkpoint/kata-checkpoint.json", "{}"),
		reg("rootfs-diff.tar", "diff"), reg("spec.dump", `{"mounts": "all"}`), reg("container.log", "said"), other("status", tar.TypeSymlink, "/etc/shadow"),
		other("dev", tar.TypeBlock, ""), reg("../escaped", "x"), reg("/etc/escaped", "x"),
	}
	taken := map[string]string{"checkpoint/a.img": "A", "checkpoint/kata-checkpoint.json": "{}", "rootfs-diff.tar": "diff"}
	limits := imageset.Limits{Files: 3, Bytes: 7}
	for name, tc := range map[string]struct {
		data   []byte
		limits imageset.Limits
		want   map[string]string
		err    string
	}{
		"what a restore needs, and nothing else": {data: archiveOf(t, whole...), want: taken},
		"compressed":                             {data: gzipped(t, archiveOf(t, whole...)), want: taken},
		"without changes of the root":            {data: archiveOf(t, reg("checkpoint/a.img", "A")), want: map[string]string{"checkpoint/a.img": "A"}},
		"nothing in it":                          {data: archiveOf(t, other("checkpoint/", tar.TypeDir, "")), err: "not a checkpoint archive"},
		"no archive at all":                      {data: bytes.Repeat([]byte("text "), 1000), err: "invalid tar header"},
		"cut short":                              {data: archiveOf(t, whole...)[:2000], err: "unexpected EOF"},
		"a symlink for an image":                 {data: archiveOf(t, other("checkpoint/a.img", tar.TypeSymlink, "/etc/shadow")), err: "not a regular file"},
		"a hard link for an image":               {data: archiveOf(t, other("checkpoint/a.img", tar.TypeLink, "spec.dump")), err: "not a regular file"},
		"a device for an image":                  {data: archiveOf(t, other("checkpoint/sda", tar.TypeBlock, "")), err: "not a regular file"},
		"a symlink for the root's changes":       {data: archiveOf(t, reg("checkpoint/a.img", "A"), other("rootfs-diff.tar", tar.TypeSymlink, "/x")), err: "not a regular file"},
		"a directory among the images":           {data: archiveOf(t, reg("checkpoint/sub/a.img", "A")), err: "in a subdirectory"},
		"a way out":                              {data: archiveOf(t, reg("checkpoint/../../x", "A")), err: "in a subdirectory"},
		"the parent directory":                   {data: archiveOf(t, reg("checkpoint/..", "A")), err: "in a subdirectory"},
		"an image twice":                         {data: archiveOf(t, reg("checkpoint/a.img", "A"), reg("checkpoint/a.img", "B")), err: "file exists"},
		"too many files":                         {data: archiveOf(t, whole...), limits: imageset.Limits{Files: 2, Bytes: 100}, err: "max_image_files"},
		"too many bytes":                         {data: archiveOf(t, whole...), limits: imageset.Limits{Files: 9, Bytes: 6}, err: "max_image_bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			dir, target := t.TempDir(), t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, "x.tar"), tc.data, 0o600); err != nil {
				t.Fatal(err)
			}
			if tc.limits == (imageset.Limits{}) {
				tc.limits = limits
			}
			err := Extract(t.Context(), dir, "x.tar", target, tc.limits)
			if tc.err != "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) || !strings.Contains(err.Error(), "x.tar") {
					t.Fatalf("error %v, want one with %q and the archive's name", err, tc.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tc.want, files(t, target)); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

// files are those below dir with their content. All are private, whatever the
// archive says.
func files(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if info.Mode() != 0o600 {
			t.Errorf("%s has mode %v", path, info.Mode())
		}
		data, err := os.ReadFile(path)
		rel, _ := filepath.Rel(dir, path)
		out[rel] = string(data)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestNamesOfArchives(t *testing.T) {
	outside, dir := t.TempDir(), t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, "x.tar"), archiveOf(t, reg("checkpoint/a.img", "A")), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(outside, "x.tar"), filepath.Join(dir, "link.tar")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "sub"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"": "not the name of an archive", "..": "not the name of an archive", "sub/x.tar": "not the name of an archive", filepath.Join(outside, "x.tar"): "not the name of an archive",
		"sub": "not a regular file", "link.tar": "not a regular file",
	} {
		if err := Extract(t.Context(), dir, name, t.TempDir(), imageset.Limits{Files: 9, Bytes: 99}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: error %v, want one with %q", name, err, want)
		}
	}
	if err := Extract(t.Context(), dir, "none.tar", t.TempDir(), imageset.Limits{Files: 9, Bytes: 99}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("none.tar: error %v", err)
	}
}

func TestManifest(t *testing.T) {
	const manifest = `{"formatVersion": 1, "files": [{"name": "inventory.img", "size": 1, "sha256": "0000000000000000000000000000000000000000000000000000000000000000"}],
		"connections": [{"local": "192.0.2.2:80", "remote": "[2001:db8::1]:5000"}]}`
	big := reg("checkpoint/a.img", strings.Repeat("a", 1<<20))
	for name, tc := range map[string]struct {
		entries []entry
		want    string
	}{
		"after the images":     {[]entry{big, reg("checkpoint/kata-checkpoint.json", manifest), reg("rootfs-diff.tar", "diff")}, ""},
		"by another name":      {[]entry{reg("./checkpoint/kata-checkpoint.json", manifest)}, ""},
		"not in the image set": {[]entry{big, reg("kata-checkpoint.json", manifest)}, "it is no checkpoint archive"},
		"damaged":              {[]entry{reg("checkpoint/kata-checkpoint.json", manifest[:20])}, "is damaged"},
		"an end is missing":    {[]entry{reg("checkpoint/kata-checkpoint.json", strings.Replace(manifest, "192.0.2.2:80", "", 1))}, "is damaged"},
	} {
		t.Run(name, func(t *testing.T) {
			for suffix, data := range map[string][]byte{"tar": archiveOf(t, tc.entries...), "tar.gz": gzipped(t, archiveOf(t, tc.entries...))} {
				dir := t.TempDir()
				if err := os.WriteFile(filepath.Join(dir, "x."+suffix), data, 0o600); err != nil {
					t.Fatal(err)
				}
				m, err := Manifest(t.Context(), dir, "x."+suffix)
				switch {
				case tc.want != "":
					if err == nil || !strings.Contains(err.Error(), tc.want) {
						t.Errorf("%s: %v", suffix, err)
					}
				case err != nil:
					t.Errorf("%s: %v", suffix, err)
				case len(m.Connections) != 1 || m.Connections[0].Remote.String() != "[2001:db8::1]:5000":
					t.Errorf("%s: %+v", suffix, m.Connections)
				}
			}
		})
	}
	if _, err := Manifest(t.Context(), t.TempDir(), "x.tar"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no archive: %v", err)
	}
	if _, err := Manifest(t.Context(), t.TempDir(), "../x.tar"); err == nil {
		t.Error("an archive elsewhere is read")
	}
}
