// SPDX-License-Identifier: Apache-2.0

package export_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"testing"

	"filippo.io/age"

	"github.com/kata-checkpoint/kata-checkpoint/internal/export"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
	"github.com/kata-checkpoint/kata-checkpoint/internal/store"
	"github.com/kata-checkpoint/kata-checkpoint/internal/teststore"
)

var limits = imageset.Limits{Files: 100, Bytes: 1 << 20}

func nothing(int64) {}

// record is what checkpoints in these tests are made of.
func record() store.Record {
	return store.Record{Engine: "nerdctl", Namespace: "default", Container: "id", ContainerName: "web", Image: "docker.io/library/web:1", Group: "g"}
}

// written is a checkpoint as an archive.
func written(t *testing.T, c *store.Checkpoint, compression export.Compression, to ...age.Recipient) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := export.Write(t.Context(), &b, c, compression, to, nothing); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// read stores an archive under a name. Without an error that is a checkpoint.
func read(t *testing.T, s *store.Store, name string, data []byte, limits imageset.Limits, identities ...age.Identity) (*store.Checkpoint, error) {
	t.Helper()
	draft, err := s.Begin(name)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := draft.Abort(); err != nil {
			t.Error(err)
		}
	}()
	r, _, err := export.Read(t.Context(), bytes.NewReader(data), draft, identities, limits, nothing)
	if err == nil {
		err = draft.Commit(t.Context(), r)
	}
	if err != nil {
		return nil, err
	}
	return s.Open(name)
}

func TestRoundTrip(t *testing.T) {
	key, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	s := store.New(teststore.Dir(t))
	c := teststore.Add(t, s, teststore.Checkpoint{Name: "a", Record: record(), Memory: strings.Repeat("memory ", 1000)})
	for _, compression := range []export.Compression{export.Zstd, export.Gzip, export.None} {
		for _, encrypted := range []bool{false, true} {
			name := string(compression)
			var to []age.Recipient
			if encrypted {
				name, to = name+"-age", []age.Recipient{key.Recipient()}
			}
			data := written(t, c, compression, to...)
			if readable := bytes.Contains(data, []byte("memory memory")); readable != (compression == export.None && !encrypted) {
				t.Errorf("%s: memory can be read: %v", name, readable)
			}
			back, err := read(t, s, name, data, limits, key)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if back.ContainerName != "web" || back.Engine != "nerdctl" || back.Container != "id" || back.Image != c.Image || back.Group != "g" {
				t.Errorf("%s: %+v", name, back.Record)
			}
			if err := back.Check(t.Context(), nothing); err != nil || len(back.Files) != len(c.Files) {
				t.Errorf("%s: %v, %v", name, err, back.Files)
			}
		}
	}
	if err := export.Write(t.Context(), io.Discard, c, "lz4", nil, nothing); err == nil || !strings.Contains(err.Error(), "lz4") {
		t.Errorf("an unknown compression: %v", err)
	}
}

func TestEncrypted(t *testing.T) {
	mine, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	other, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	s := store.New(teststore.Dir(t))
	data := written(t, teststore.Add(t, s, teststore.Checkpoint{Name: "a", Record: record()}), export.Zstd, mine.Recipient())
	if _, err := read(t, s, "b", data, limits); !errors.Is(err, export.ErrEncrypted) {
		t.Errorf("without an identity: %v", err)
	}
	if _, err := read(t, s, "b", data, limits, other); err == nil || !strings.Contains(err.Error(), "encrypted for others") {
		t.Errorf("with another's: %v", err)
	}
	if _, err := read(t, s, "b", data[:len(data)-1], limits, mine); err == nil {
		t.Error("one that is cut short is imported")
	}
	changed := bytes.Clone(data)
	changed[len(changed)-20] ^= 1
	if _, err := read(t, s, "b", changed, limits, mine); err == nil {
		t.Error("one that was changed is imported")
	}
}

// The layout is what other tools know: a directory first, the manifest next.
func TestLayout(t *testing.T) {
	s := store.New(teststore.Dir(t))
	data := written(t, teststore.Add(t, s, teststore.Checkpoint{Name: "a", Record: record()}), export.None)
	var names []string
	for r := tar.NewReader(bytes.NewReader(data)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, h.Name)
		if h.Mode&0o077 != 0 {
			t.Errorf("%s has the mode %o", h.Name, h.Mode)
		}
	}
	all := strings.Join(names, " ")
	if !strings.HasPrefix(all, "checkpoint/ checkpoint/kata-checkpoint.json kata-checkpoint-record.json config.dump spec.dump status.dump stats-dump rootfs-diff.tar checkpoint/") {
		t.Errorf("%s", all)
	}
}

// entries are an archive's.
type entry struct {
	tar.Header
	content string
}

func entriesOf(t *testing.T, data []byte) (out []entry) {
	t.Helper()
	for r := tar.NewReader(bytes.NewReader(data)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, entry{*h, string(content)})
	}
}

func archiveOf(t *testing.T, entries []entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		e.Size = int64(len(e.content))
		if err := w.WriteHeader(&e.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestForeignArchives(t *testing.T) {
	regular := func(name, content string) entry {
		return entry{tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o600}, content}
	}
	with := func(more ...entry) func([]entry) []entry {
		return func(l []entry) []entry { return append(l, more...) }
	}
	change := func(name string, f func(*entry)) func([]entry) []entry {
		return func(l []entry) []entry {
			for i := range l {
				if l[i].Name == name {
					f(&l[i])
				}
			}
			return l
		}
	}
	drop := func(name string) func([]entry) []entry {
		return func(l []entry) (out []entry) {
			for _, e := range l {
				if e.Name != name {
					out = append(out, e)
				}
			}
			return out
		}
	}
	for name, tc := range map[string]struct {
		edit   func([]entry) []entry
		limits imageset.Limits
		err    string
	}{
		"as it was written":           {edit: with()},
		"with files of an engine":     {edit: with(regular("container.log", "x"), regular("status", "{}"), regular("../escaped", "x"), entry{Header: tar.Header{Name: "dev", Typeflag: tar.TypeBlock}})},
		"without a record":            {edit: drop(store.RecordName)},
		"an unknown image":            {edit: with(regular("checkpoint/userns-1.img", "x")), err: "cannot be in a checkpoint"},
		"a way out":                   {edit: with(regular("checkpoint/../../x", "x")), err: "cannot be in a checkpoint"},
		"a subdirectory":              {edit: with(regular("checkpoint/a/pages-1.img", "x")), err: "cannot be in a checkpoint"},
		"a file twice":                {edit: with(regular("spec.dump", "x")), err: "file exists"},
		"a link for a file":           {edit: with(entry{Header: tar.Header{Name: "dump.log", Typeflag: tar.TypeSymlink, Linkname: "/etc/shadow"}}), err: "not a regular file"},
		"an image that was changed":   {edit: change("checkpoint/pages-1.img", func(e *entry) { e.content = strings.ToUpper(e.content) }), err: "pages-1.img is damaged"},
		"a file that was changed":     {edit: change("spec.dump", func(e *entry) { e.content += " " }), err: "spec.dump is damaged"},
		"without a manifest":          {edit: drop("checkpoint/kata-checkpoint.json"), err: "kata-checkpoint.json"},
		"without an image":            {edit: drop("checkpoint/pages-1.img"), err: "pages-1.img is missing"},
		"a damaged record":            {edit: change(store.RecordName, func(e *entry) { e.content = "{" }), err: store.RecordName},
		"another text":                {edit: func([]entry) []entry { return []entry{regular("x", "y")} }, err: "not a checkpoint archive"},
		"more bytes than allowed":     {edit: with(), limits: imageset.Limits{Files: 100, Bytes: 100}, err: "max_image_bytes"},
		"more files than allowed":     {edit: with(), limits: imageset.Limits{Files: 3, Bytes: 1 << 20}, err: "max_image_files"},
		"a record that lies":          {edit: change(store.RecordName, func(e *entry) { e.content = strings.Replace(e.content, `"container": "id"`, `"container": "else"`, 1) })},
		"a record with escapes in it": {edit: change(store.RecordName, func(e *entry) { e.content = strings.Replace(e.content, `"web"`, `"w\u001bb"`, 1) })},
	} {
		t.Run(name, func(t *testing.T) {
			s := store.New(teststore.Dir(t))
			data := archiveOf(t, tc.edit(entriesOf(t, written(t, teststore.Add(t, s, teststore.Checkpoint{Name: "a", Record: record(), Memory: "memory"}), export.None))))
			l := limits
			if tc.limits.Files > 0 {
				l = tc.limits
			}
			c, err := read(t, s, "b", data, l)
			if tc.err != "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) {
					t.Fatalf("error %v, want one with %q", err, tc.err)
				}
				if left, err := os.ReadDir(s.Dir()); err != nil || len(left) != 1 {
					t.Errorf("there is %v (%v)", left, err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if c.Container != "id" || strings.Contains(c.ContainerName, "\x1b") || c.Created.IsZero() {
				t.Errorf("%+v", c.Record)
			}
		})
	}
}

func TestWriteDamaged(t *testing.T) {
	s := store.New(teststore.Dir(t))
	c := teststore.Add(t, s, teststore.Checkpoint{Name: "a", Record: record(), Memory: "memory"})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := export.Write(ctx, io.Discard, c, export.None, nil, nothing); !errors.Is(err, context.Canceled) {
		t.Errorf("interrupted: %v", err)
	}
	if err := os.WriteFile(c.Images()+"/pages-1.img", []byte("MEMORY"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := export.Write(t.Context(), io.Discard, c, export.None, nil, nothing); err == nil || !strings.Contains(err.Error(), "pages-1.img is damaged") {
		t.Errorf("damaged: %v", err)
	}
}
