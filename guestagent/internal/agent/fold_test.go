// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
)

// entry is one of a list of pages. Address is in pages.
type entry struct {
	address, pages, flags uint64
}

// writePagemap writes a list of pages, and the content of each page: the letter.
func writePagemap(t *testing.T, dir, name string, file uint64, wide bool, letter byte, entries ...entry) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	magic := binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, imageMagic), pagemapMagic)
	image := &entriesImage{magic: magic, entries: [][]byte{protowire.AppendVarint(protowire.AppendTag(nil, 1, protowire.VarintType), file)}}
	var content []byte
	for _, e := range entries {
		var data []byte
		field := func(n protowire.Number, v uint64) {
			data = protowire.AppendVarint(protowire.AppendTag(data, n, protowire.VarintType), v)
		}
		field(fieldAddress, e.address*pageSize)
		if wide {
			field(fieldPages, 0)
			field(fieldPages64, e.pages)
		} else {
			field(fieldPages, e.pages)
		}
		field(fieldFlags, e.flags)
		image.entries = append(image.entries, data)
		if e.flags&pagesPresent != 0 {
			for i := range e.pages {
				content = append(content, bytes.Repeat([]byte{letter, byte(e.address + i)}, int(pageSize/2))...)
			}
		}
	}
	if err := image.write(filepath.Join(dir, name)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, pagesName(file)), content, 0o600); err != nil {
		t.Fatal(err)
	}
}

// contents reads the content that a folded file has: for each page the letter of
// its round and its address.
func contents(t *testing.T, dirs []string, f *api.FoldedFile) (out []string) {
	t.Helper()
	for i, n := range f.GetPartSources() {
		data, err := os.ReadFile(filepath.Join(dirs[f.GetSourceDirectories()[n]], f.GetSourceNames()[n]))
		if err != nil {
			t.Fatal(err)
		}
		part := data[f.GetPartOffsets()[i]:][:f.GetPartSizes()[i]]
		for ; len(part) > 0; part = part[pageSize:] {
			out = append(out, string(part[0])+string('0'+rune(part[1])))
		}
	}
	return out
}

func TestFold(t *testing.T) {
	const parent, present, lazy = pagesInParent, pagesPresent, 2
	for name, wide := range map[string]bool{"as CRIU wrote it": false, "with wide numbers": true} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			dirs := []string{filepath.Join(dir, "1"), filepath.Join(dir, "2"), filepath.Join(dir, "3")}
			write := func(round int, name string, file uint64, entries ...entry) {
				writePagemap(t, dirs[round], name, file, wide, "abc"[round], entries...)
			}
			// One that changes: some pages in each round, one that goes away, one that comes.
			write(0, "pagemap-1.img", 1, entry{0, 4, present}, entry{6, 2, present | lazy})
			write(1, "pagemap-1.img", 2, entry{0, 1, parent}, entry{1, 1, present}, entry{2, 2, parent}, entry{6, 2, parent})
			write(2, "pagemap-1.img", 1, entry{0, 3, parent}, entry{4, 1, present}, entry{6, 1, parent}, entry{7, 1, present | lazy})
			// One that was not there in the second round, and one that is new.
			write(0, "pagemap-2.img", 2, entry{0, 1, present})
			write(2, "pagemap-2.img", 2, entry{0, 1, present})
			write(2, "pagemap-shmem-3.img", 3, entry{5, 1, present})

			folded, err := fold(dirs)
			if err != nil {
				t.Fatal(err)
			}
			got := map[string]string{}
			for _, f := range folded.GetFiles() {
				got[f.GetName()] = strings.Join(contents(t, dirs, f), " ")
			}
			if diff := cmp.Diff(map[string]string{"pages-1.img": "a0 b1 a2 c4 a6 c7", "pages-2.img": "c0", "pages-3.img": "c5"}, got); diff != "" {
				t.Error(diff)
			}
			m, err := readPagemap(filepath.Join(dirs[2], "pagemap-1.img"))
			if err != nil {
				t.Fatal(err)
			}
			var entries []entry
			for _, r := range m.runs {
				entries = append(entries, entry{r.address / pageSize, r.pages, r.flags})
			}
			if diff := cmp.Diff([]entry{{0, 3, present}, {4, 1, present}, {6, 2, present | lazy}}, entries, cmp.AllowUnexported(entry{})); diff != "" {
				t.Error(diff)
			}
			if m.wide != wide || m.file != 1 {
				t.Errorf("wide: %t, file %d", m.wide, m.file)
			}
		})
	}
}

func TestFoldOfDamagedImages(t *testing.T) {
	for name, tc := range map[string]struct {
		first, last []entry
		err         string
	}{
		"a page that is in no round":  {[]entry{{0, 1, pagesPresent}}, []entry{{0, 2, pagesInParent}}, "in no pre-dump"},
		"a page before all others":    {[]entry{{1, 1, pagesPresent}}, []entry{{0, 1, pagesInParent}}, "in no pre-dump"},
		"pages that are not in order": {[]entry{{0, 1, pagesPresent}}, []entry{{2, 1, pagesPresent}, {1, 1, pagesPresent}}, "not in order"},
		"no pages":                    {nil, []entry{{0, 0, pagesPresent}}, "0 pages"},
		"more pages than there are":   {nil, []entry{{1, 1 << 52, pagesPresent}}, "pages at"},
		"neither here nor there":      {nil, []entry{{0, 1, 2}}, "unknown flags"},
		"a round that refers to none": {[]entry{{0, 1, pagesInParent}}, []entry{{0, 1, pagesPresent}}, "in no pre-dump"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			dirs := []string{filepath.Join(dir, "1"), filepath.Join(dir, "2")}
			for i, list := range [][]entry{tc.first, tc.last} {
				for j := range list {
					if list[j].pages > 100 {
						list[j].flags &^= pagesPresent // no content for it
					}
				}
				writePagemap(t, dirs[i], "pagemap-1.img", 1, true, 'a', list...)
			}
			if _, err := fold(dirs); err == nil || !strings.Contains(err.Error(), tc.err) {
				t.Errorf("error %v lacks %q", err, tc.err)
			}
		})
	}
}
