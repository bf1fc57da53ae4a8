// SPDX-License-Identifier: Apache-2.0

package task

import (
	"archive/tar"
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/google/go-cmp/cmp"
)

func TestChangesOfTheRootGiveNoRights(t *testing.T) {
	for name, tc := range map[string]struct {
		in, want *tar.Header
	}{
		"a file": {
			in:   &tar.Header{Name: "a", Typeflag: tar.TypeReg, Mode: 0o755, Uid: 1000},
			want: &tar.Header{Name: "a", Typeflag: tar.TypeReg, Mode: 0o755, Uid: 1000},
		},
		"set-user-ID":  {in: &tar.Header{Typeflag: tar.TypeReg, Mode: 0o4755}, want: &tar.Header{Typeflag: tar.TypeReg, Mode: 0o755}},
		"set-group-ID": {in: &tar.Header{Typeflag: tar.TypeReg, Mode: 0o2755}, want: &tar.Header{Typeflag: tar.TypeReg, Mode: 0o755}},
		"a directory that passes its group on": {
			in:   &tar.Header{Typeflag: tar.TypeDir, Mode: 0o7777},
			want: &tar.Header{Typeflag: tar.TypeDir, Mode: 0o3777},
		},
		"a hard link": {
			in:   &tar.Header{Typeflag: tar.TypeLink, Mode: 0o6755, Linkname: "bin/sh"},
			want: &tar.Header{Typeflag: tar.TypeLink, Mode: 0o755, Linkname: "bin/sh"},
		},
		"a FIFO":          {in: &tar.Header{Typeflag: tar.TypeFifo, Mode: 0o4644}, want: &tar.Header{Typeflag: tar.TypeFifo, Mode: 0o644}},
		"a global header": {in: &tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": "c"}}},
		"capabilities, and what overlayfs takes for its own": {
			in: &tar.Header{Typeflag: tar.TypeReg, PAXRecords: map[string]string{
				"SCHILY.xattr.security.capability": "x", "SCHILY.xattr.trusted.overlay.redirect": "/", "SCHILY.xattr.user.note": "y", "mtime": "1.5",
			}},
			want: &tar.Header{Typeflag: tar.TypeReg, PAXRecords: map[string]string{"SCHILY.xattr.user.note": "y", "mtime": "1.5"}},
		},
		"a character device": {in: &tar.Header{Typeflag: tar.TypeChar}},
		"a block device":     {in: &tar.Header{Typeflag: tar.TypeBlock}},
		"a link":             {in: &tar.Header{Typeflag: tar.TypeSymlink, Mode: 0o777, Linkname: "/x"}, want: &tar.Header{Typeflag: tar.TypeSymlink, Mode: 0o777, Linkname: "/x"}},
	} {
		t.Run(name, func(t *testing.T) {
			taken, err := withoutAuthority(t.Context())(tc.in)
			if err != nil {
				t.Fatal(err)
			}
			if taken != (tc.want != nil) {
				t.Fatalf("taken: %v", taken)
			}
			if tc.want == nil {
				return
			}
			if diff := cmp.Diff(tc.want, tc.in); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

// containerd gives a file the mode of each of its links.
func TestLinksGiveNoRights(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("an archive is applied by root")
	}
	var diff bytes.Buffer
	w := tar.NewWriter(&diff)
	for _, h := range []*tar.Header{
		{Name: "sh", Typeflag: tar.TypeReg, Mode: 0o755},
		{Name: "link", Typeflag: tar.TypeLink, Linkname: "sh", Mode: 0o6755},
	} {
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	if _, err := archive.Apply(t.Context(), root, &diff, archive.WithFilter(withoutAuthority(t.Context()))); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"sh", "link"} {
		st, err := os.Lstat(filepath.Join(root, name))
		if err != nil {
			t.Fatal(err)
		}
		if st.Mode() != 0o755 {
			t.Errorf("%s has mode %v", name, st.Mode())
		}
	}
}

func TestUnknownEntriesAreRefused(t *testing.T) {
	for _, kind := range []byte{tar.TypeCont, tar.TypeGNUSparse, 'Z'} {
		if _, err := withoutAuthority(t.Context())(&tar.Header{Name: "a", Typeflag: kind}); err == nil || !strings.Contains(err.Error(), "type") {
			t.Errorf("%q: error %v", kind, err)
		}
	}
}
