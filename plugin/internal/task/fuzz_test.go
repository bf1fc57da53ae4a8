// SPDX-License-Identifier: Apache-2.0

package task

import (
	"archive/tar"
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/kata-checkpoint/kata-checkpoint/internal/budget"
)

// Whatever a root file system diff is, nothing that it makes gives a right, or
// is outside of the root, and it takes no more than it may.
func FuzzRootfsDiff(f *testing.F) {
	if os.Geteuid() != 0 {
		f.Skip("an archive is applied by root")
	}
	seed := func(headers ...tar.Header) {
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
		f.Add(buf.Bytes())
	}
	seed(tar.Header{Name: "tmp/sh", Typeflag: tar.TypeReg, Mode: 0o755, Size: 5}, tar.Header{Name: "tmp/link", Typeflag: tar.TypeLink, Linkname: "tmp/sh", Mode: 0o6755})
	seed(tar.Header{Name: "out", Typeflag: tar.TypeSymlink, Linkname: "../outside"}, tar.Header{Name: "out/f", Typeflag: tar.TypeReg, Mode: 0o4755})
	seed(tar.Header{Name: "../outside/f", Typeflag: tar.TypeReg, Mode: 0o4755}, tar.Header{Name: "dev/sda", Typeflag: tar.TypeBlock, Mode: 0o666})
	seed(tar.Header{Name: "etc/.wh.passwd", Typeflag: tar.TypeReg}, tar.Header{Name: ".wh..wh..opq", Typeflag: tar.TypeReg}, tar.Header{Name: "d", Typeflag: tar.TypeDir, Mode: 0o7777})
	seed(tar.Header{Name: "f", Typeflag: tar.TypeReg, Format: tar.FormatPAX, PAXRecords: map[string]string{"SCHILY.xattr.security.capability": "x", "SCHILY.xattr.user.a": "b"}})
	limits := budget.Limits{Files: 8, Bytes: 64 << 10}
	f.Fuzz(func(t *testing.T, data []byte) {
		dir := t.TempDir()
		root, outside := filepath.Join(dir, "root"), filepath.Join(dir, "outside")
		for _, d := range []string{filepath.Join(root, "etc"), outside} {
			if err := os.MkdirAll(d, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(filepath.Join(root, "etc/passwd"), nil, 0o644); err != nil {
			t.Fatal(err)
		}
		_ = applyDiff(t.Context(), bytes.NewReader(data), root, limits) // it may fail half way
		var total int64
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			st, err := d.Info()
			if err != nil {
				return err
			}
			if st.Mode()&(fs.ModeDevice|fs.ModeCharDevice|fs.ModeSetuid) != 0 || st.Mode()&fs.ModeSetgid != 0 && !d.IsDir() {
				t.Errorf("%s has mode %v", path, st.Mode())
			}
			if d.Type().IsRegular() {
				total += st.Size()
			}
			n, err := syscall.Getxattr(path, "security.capability", nil)
			if err == nil {
				t.Errorf("%s has capabilities, of %d bytes", path, n)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadDir(outside); err != nil || len(got) > 0 {
			t.Errorf("outside there is %v, %v", got, err)
		}
		if got, err := os.ReadDir(dir); err != nil || len(got) != 2 {
			t.Errorf("beside the root there is %v, %v", got, err)
		}
		if total > limits.Bytes {
			t.Errorf("%d bytes were written", total)
		}
	})
}
