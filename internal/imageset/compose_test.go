// SPDX-License-Identifier: Apache-2.0

package imageset

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// exchanged makes the directories of two rounds beneath a directory.
func exchanged(t *testing.T) string {
	t.Helper()
	src := t.TempDir()
	for path, content := range map[string]string{"1/pages-1.img": "aabbcc", "2/pages-1.img": "dd", "2/inventory.img": "i"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(src, path)), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(src, path), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return src
}

func composed(t *testing.T, src, name string, c Composition) (string, []File, error) {
	t.Helper()
	to := t.TempDir()
	dst, err := openDir(to)
	if err != nil {
		t.Fatal(err)
	}
	defer dst.Close()
	f := Follow(src, "2", dst, Limits{Files: 10, Bytes: 100})
	defer f.Stop()
	f.Compose(name, c)
	files, err := f.Collect(t.Context())
	if err != nil {
		return "", nil, err
	}
	data, err := os.ReadFile(filepath.Join(to, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(data), files, nil
}

func TestCompose(t *testing.T) {
	got, files, err := composed(t, exchanged(t), "pages-1.img", Composition{
		Sources: []Source{{"1", "pages-1.img"}, {"2", "pages-1.img"}},
		Parts:   []Part{{0, 4, 2}, {1, 0, 1}, {0, 0, 3}, {1, 1, 1}},
	})
	if err != nil {
		t.Fatal(err)
	}
	const want = "ccdaabd"
	if got != want || len(files) != 2 || files[1] != (File{Name: "pages-1.img", Size: int64(len(want)), BLAKE3: digest(want)}) {
		t.Errorf("%q, files %+v", got, files)
	}
	if got, _, err := composed(t, exchanged(t), "pages-1.img", Composition{}); err != nil || got != "" {
		t.Errorf("of nothing: %q, %v", got, err)
	}
}

// The guest is not trusted with where the parts are.
func TestComposeIsBounded(t *testing.T) {
	one := []Source{{"1", "pages-1.img"}}
	for name, tc := range map[string]struct {
		file        string
		composition Composition
		err         string
	}{
		"behind the end":         {"pages-1.img", Composition{one, []Part{{0, 5, 2}}}, "not there"},
		"before the beginning":   {"pages-1.img", Composition{one, []Part{{0, -1, 2}}}, "not there"},
		"of no size":             {"pages-1.img", Composition{one, []Part{{0, 1, 0}}}, "not there"},
		"of another source":      {"pages-1.img", Composition{one, []Part{{1, 0, 1}}}, "not there"},
		"of no source":           {"pages-1.img", Composition{one, []Part{{-1, 0, 1}}}, "not there"},
		"of an overflow":         {"pages-1.img", Composition{one, []Part{{0, 1<<63 - 1, 2}}}, "not there"},
		"too much":               {"pages-1.img", Composition{one, repeated(Part{0, 0, 6}, 20)}, "larger than allowed"},
		"outside":                {"pages-1.img", Composition{[]Source{{"..", "pages-1.img"}}, nil}, "open"},
		"no image":               {"pages-1.img", Composition{[]Source{{"1", "../../etc/passwd"}}, nil}, "not an image"},
		"a file that is missing": {"pages-2.img", Composition{one, []Part{{0, 0, 1}}}, "has not written pages-2.img"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, _, err := composed(t, exchanged(t), tc.file, tc.composition); err == nil || !strings.Contains(err.Error(), tc.err) {
				t.Errorf("error %v lacks %q", err, tc.err)
			}
		})
	}
}

func repeated(p Part, n int) (out []Part) {
	for range n {
		out = append(out, p)
	}
	return out
}

// A symbolic link is no source, wherever it leads.
func TestComposeFollowsNoLink(t *testing.T) {
	src := exchanged(t)
	if err := os.Symlink("1", filepath.Join(src, "3")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("../1/pages-1.img", filepath.Join(src, "1", "pages-7.img")); err != nil {
		t.Fatal(err)
	}
	for _, s := range []Source{{"3", "pages-1.img"}, {"1", "pages-7.img"}} {
		if got, _, err := composed(t, src, "pages-1.img", Composition{Sources: []Source{s}, Parts: []Part{{0, 0, 1}}}); err == nil {
			t.Errorf("%v: %q", s, got)
		}
	}
}
