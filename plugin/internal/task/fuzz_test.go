// SPDX-License-Identifier: Apache-2.0

package task

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/budget"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
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

// What an agent answers becomes a manifest that can be read again and says the
// same, or none.
func FuzzAnswerToManifest(f *testing.F) {
	f.Add([]byte(`{"hostname":"h\u0001","kernelRelease":"6.1","criuVersion":40201,"cpuFeatures":["fpu"],"externals":[{"name":"m0","destination":"/data","fstype":"virtiofs"}],
		"stdio":[{"fd":1,"key":"pipe:[7]"}],"openFiles":[{"path":"L2RhdGEv/w==","size":5}],"connections":[{"local":"192.0.2.1:5","remote":"[::1]:6"}],
		"addresses":[{"interface":"eth0","address":"192.0.2.1"}],"phases":[{"name":"criu dump","nanoseconds":"1"}]}`))
	f.Add([]byte(`{"externals":[{"name":"m0]:/\u0000","destination":"data"}],"stdio":[{"fd":4711}],"connections":[{"local":"x"}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		out := &api.CheckpointResponse{}
		if protojson.Unmarshal(data, out) != nil {
			return
		}
		c := &container{s: &Service{namespace: "ns"}, id: "c1", args: []string{"sh"}, annotations: map[string]string{}, externals: []string{"/data"}}
		j := &checkpointJob{checkpointRequest: &checkpointRequest{options: &api.CheckpointOptions{}}, c: c, phases: &phases{}}
		m, err := j.manifest(out, []imageset.File{{Name: "inventory.img", SHA256: strings.Repeat("0", 64)}})
		if err != nil {
			return
		}
		m.FormatVersion = imageset.FormatVersion
		written, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		read, err := imageset.ReadManifest(bytes.NewReader(written))
		if err != nil {
			return // nor is it committed (TestCommitWritesNothingThatCannotBeRead)
		}
		if again, err := json.Marshal(read); err != nil || !bytes.Equal(again, written) {
			t.Errorf("%s is read as %s, %v", written, again, err)
		}
		// What is asked of the agent at the restore is what was answered.
		c.source = &source{manifest: read}
		c.exchange = &exchange{}
		r := restoreRequest(c)
		if len(r.GetExternals()) != len(out.GetExternals()) || len(r.GetStdio()) != len(out.GetStdio()) || len(r.GetOpenFiles()) != len(out.GetOpenFiles()) {
			t.Errorf("%v is restored by %v", out, r)
		}
		for i, e := range r.GetExternals() {
			if e.GetName() != imageset.ExternalName(i) || !filepath.IsAbs(e.GetDestination()) {
				t.Errorf("the agent is given %v", e)
			}
		}
		for i, file := range r.GetOpenFiles() {
			if !bytes.Equal(file.GetPath(), out.GetOpenFiles()[i].GetPath()) {
				t.Errorf("%q has become %q", out.GetOpenFiles()[i].GetPath(), file.GetPath())
			}
		}
	})
}
