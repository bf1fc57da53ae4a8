// SPDX-License-Identifier: Apache-2.0

package task

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kata-checkpoint/kata-checkpoint/internal/budget"
)

// someRoom is enough for what a test needs.
var someRoom = budget.Limits{Files: 100, Bytes: 1 << 20}

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
	if err := applyDiff(t.Context(), &diff, root, someRoom); err != nil {
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

// tarOf writes an archive of one file of zeros.
func tarOf(t *testing.T, w io.Writer, size int64) {
	t.Helper()
	archive := tar.NewWriter(w)
	if err := archive.WriteHeader(&tar.Header{Name: "var/zeros", Typeflag: tar.TypeReg, Mode: 0o644, Size: size}); err != nil {
		t.Fatal(err)
	}
	zeros := make([]byte, 1<<20)
	for left := size; left > 0; {
		n, err := archive.Write(zeros[:min(left, int64(len(zeros)))])
		if err != nil {
			t.Fatal(err)
		}
		left -= int64(n)
	}
	if err := archive.Close(); err != nil {
		t.Fatal(err)
	}
}

// An archive of some KiB may unpack to as much as the disk has.
func TestARootFileSystemDiffIsBounded(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("an archive is applied by root")
	}
	var bomb bytes.Buffer
	w := gzip.NewWriter(&bomb)
	tarOf(t, w, 64<<20)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if bomb.Len() > 100<<10 {
		t.Fatalf("it has %d bytes", bomb.Len())
	}
	for name, tc := range map[string]struct {
		limits budget.Limits
		err    string
	}{
		"within the limits": {limits: budget.Limits{Files: 1, Bytes: 64 << 20}},
		"a byte too many":   {limits: budget.Limits{Files: 1, Bytes: 64<<20 - 1}, err: "max_image_bytes"},
		"a file too many":   {limits: budget.Limits{Bytes: 64 << 20}, err: "max_image_files"},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			err := applyDiff(t.Context(), bytes.NewReader(bomb.Bytes()), root, tc.limits)
			st, serr := os.Stat(filepath.Join(root, "var/zeros"))
			if tc.err == "" {
				if err != nil || serr != nil || st.Size() != 64<<20 {
					t.Errorf("%v, %v, %v", err, st, serr)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tc.err) {
				t.Errorf("error %v, want one with %q", err, tc.err)
			}
			if serr == nil {
				t.Errorf("%d bytes were written", st.Size())
			}
		})
	}
}

func TestARootFileSystemDiffEndsWithItsContext(t *testing.T) {
	r, w := io.Pipe()
	defer r.Close()
	go func() {
		archive := tar.NewWriter(w)
		for err := error(nil); err == nil; {
			err = archive.WriteHeader(&tar.Header{Name: "f", Typeflag: tar.TypeReg, Mode: 0o644})
		}
	}()
	why := errors.New("enough")
	ctx, cancel := context.WithTimeoutCause(t.Context(), 50*time.Millisecond, why)
	defer cancel()
	done := make(chan error, 1)
	root := t.TempDir()
	go func() { done <- applyDiff(ctx, r, root, budget.Limits{Files: 1 << 62}) }()
	select {
	case err := <-done:
		if !errors.Is(err, why) && !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error %v", err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("it does not end")
	}
}
