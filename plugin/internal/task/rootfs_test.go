// SPDX-License-Identifier: Apache-2.0

package task

import (
	"archive/tar"
	"testing"

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
			in:   &tar.Header{Typeflag: tar.TypeDir, Mode: 0o3777},
			want: &tar.Header{Typeflag: tar.TypeDir, Mode: 0o3777},
		},
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
