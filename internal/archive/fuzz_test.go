// SPDX-License-Identifier: Apache-2.0

package archive

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
)

// Whatever an archive is, what is unpacked are regular files of mode 0600, in
// the target, within the limits.
func FuzzExtract(f *testing.F) {
	seed := func(headers ...tar.Header) []byte {
		var buf bytes.Buffer
		w := tar.NewWriter(&buf)
		for _, h := range headers {
			if err := w.WriteHeader(&h); err != nil {
				f.Fatal(err)
			}
			if _, err := w.Write(make([]byte, h.Size)); err != nil {
				f.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			f.Fatal(err)
		}
		return buf.Bytes()
	}
	whole := seed(tar.Header{Name: "checkpoint/", Typeflag: tar.TypeDir, Mode: 0o755}, tar.Header{Name: "checkpoint/a.img", Typeflag: tar.TypeReg, Mode: 0o6755, Size: 10},
		tar.Header{Name: "./rootfs-diff.tar", Typeflag: tar.TypeReg, Size: 3}, tar.Header{Name: "spec.dump", Typeflag: tar.TypeReg, Size: 700})
	f.Add(whole)
	f.Add(seed(tar.Header{Name: "checkpoint/../../x", Typeflag: tar.TypeReg, Size: 1}))
	f.Add(seed(tar.Header{Name: "checkpoint/x", Typeflag: tar.TypeSymlink, Linkname: "/etc"}, tar.Header{Name: "checkpoint/x", Typeflag: tar.TypeReg, Size: 1}))
	f.Add(seed(tar.Header{Name: "checkpoint/sda", Typeflag: tar.TypeBlock}))
	var compressed bytes.Buffer
	w := gzip.NewWriter(&compressed)
	if _, err := w.Write(whole); err != nil {
		f.Fatal(err)
	}
	if err := w.Close(); err != nil {
		f.Fatal(err)
	}
	f.Add(compressed.Bytes())
	limits := imageset.Limits{Files: 5, Bytes: 4096}
	f.Fuzz(func(t *testing.T, data []byte) {
		dir := t.TempDir()
		target := filepath.Join(dir, "target")
		if err := os.Mkdir(target, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "x.tar"), data, 0o600); err != nil {
			t.Fatal(err)
		}
		_ = Extract(t.Context(), dir, "x.tar", target, limits) // it may fail, but leave nothing else
		_, _ = Manifest(t.Context(), dir, "x.tar")
		var count int
		var total int64
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || path == filepath.Join(dir, "x.tar") {
				return err
			}
			st, err := d.Info()
			if err != nil {
				return err
			}
			count++
			total += st.Size()
			if st.Mode() != 0o600 || filepath.Dir(path) != target && filepath.Dir(path) != filepath.Join(target, imageset.ArchiveImages) {
				t.Errorf("%s has mode %v", path, st.Mode())
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if count > limits.Files || total > limits.Bytes {
			t.Errorf("%d files of %d bytes", count, total)
		}
	})
}
