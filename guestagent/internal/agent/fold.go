// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
)

// A pre-dump has the memory of a container as it was then, and a dump that is
// based on it has what has changed since. CRIU reads the one through the other at
// the restore. An image set is flat, so that the two are folded: the list of
// pages no longer refers to a parent, and the content of the pages is put
// together from the files of all rounds. That is left to the host, which copies
// the content once in any case.

const pagemapMagic = 0x56084025

// Flags of a list of pages (criu/include/pagemap.h). An entry is in the parent,
// or has content of its own.
const (
	pagesInParent = 1 << 0
	pagesPresent  = 1 << 2
)

// pageRun is a number of pages one after the other, with their content.
type pageRun struct {
	address, pages uint64
	flags          uint64
	// round is the directory with the content, in the file number pages of it, at
	// an offset in bytes.
	round  int
	file   uint64
	offset uint64
}

func (r pageRun) end() uint64 { return r.address + r.pages*pageSize }

var pageSize = uint64(os.Getpagesize())

// pagemap is a list of pages, pagemap-*.img: a message with the number of the file
// with their content, and one for each run.
type pagemap struct {
	image *entriesImage
	file  uint64
	// wide: the number of pages has the newer of its two fields.
	wide bool
	runs []pageRun
}

// Fields of a pagemap_entry (images/pagemap.proto). The numbers of pages of
// CRIU 4.2 are in the second of the two fields, if it is present.
const (
	fieldAddress  = 1
	fieldPages    = 2
	fieldInParent = 3
	fieldFlags    = 4
	fieldPages64  = 5
)

// fold makes the images in the last of some directories independent of those in
// the others, each of which is the parent of the next, and returns where the
// content is, with the directories by their numbers.
func fold(directories []string) (*api.FoldedFiles, error) {
	last := len(directories) - 1
	found, err := filepath.Glob(filepath.Join(directories[last], "pagemap-*.img"))
	if err != nil {
		return nil, err
	}
	out := &api.FoldedFiles{}
	for _, path := range found {
		name := filepath.Base(path)
		var before []pageRun
		for round, dir := range directories[:last] {
			m, err := readPagemap(filepath.Join(dir, name))
			switch {
			case errors.Is(err, os.ErrNotExist):
				before = nil // it did not exist, or was stopped: the next round has all
			case err != nil:
				return nil, err
			default:
				if before, err = m.resolve(round, before); err != nil {
					return nil, fmt.Errorf("%s of round %d: %w", name, round, err)
				}
			}
		}
		m, err := readPagemap(path)
		if err != nil {
			return nil, err
		}
		runs, err := m.resolve(last, before)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		if err := m.write(path, runs); err != nil {
			return nil, err
		}
		out.Files = append(out.Files, folded(m.file, runs))
	}
	return out, nil
}

// folded lists the parts of the content of some runs.
func folded(file uint64, runs []pageRun) *api.FoldedFile {
	type source struct {
		round int
		file  uint64
	}
	out := &api.FoldedFile{Name: pagesName(file)}
	numbers := make(map[source]uint32)
	var end uint64 // of the last part, in its file
	for _, r := range runs {
		s := source{r.round, r.file}
		n, known := numbers[s]
		if !known {
			n = uint32(len(numbers)) //nolint:gosec // few
			numbers[s] = n
			out.SourceDirectories = append(out.SourceDirectories, uint32(r.round)) //nolint:gosec // few
			out.SourceNames = append(out.SourceNames, pagesName(r.file))
		}
		size := r.pages * pageSize
		if i := len(out.PartSources) - 1; i >= 0 && out.PartSources[i] == n && end == r.offset {
			out.PartSizes[i] += size
		} else {
			out.PartSources, out.PartOffsets, out.PartSizes = append(out.PartSources, n), append(out.PartOffsets, r.offset), append(out.PartSizes, size)
		}
		end = r.offset + size
	}
	return out
}

func pagesName(file uint64) string { return fmt.Sprintf("pages-%d.img", file) }

func readPagemap(path string) (*pagemap, error) {
	image, err := readEntries(path)
	if err != nil {
		return nil, err
	}
	if len(image.entries) == 0 || binary.LittleEndian.Uint32(image.magic[4:]) != pagemapMagic {
		return nil, fmt.Errorf("%s is not a list of pages", filepath.Base(path))
	}
	m := &pagemap{image: image}
	head, err := varints(image.entries[0])
	if err != nil {
		return nil, err
	}
	m.file = head[1]
	var offset uint64
	for _, data := range image.entries[1:] {
		e, err := varints(data)
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", filepath.Base(path), err)
		}
		r := pageRun{address: e[fieldAddress], pages: e[fieldPages], flags: e[fieldFlags], file: m.file, offset: offset}
		if n, wide := e[fieldPages64]; wide {
			m.wide, r.pages = true, n
		}
		if e[fieldInParent] != 0 {
			r.flags |= pagesInParent
		}
		if r.pages == 0 || r.pages > math.MaxInt64/pageSize || r.address > math.MaxUint64-r.pages*pageSize {
			return nil, fmt.Errorf("%s has %d pages at %#x", filepath.Base(path), r.pages, r.address)
		}
		if r.flags&pagesInParent == 0 {
			if _, hasFlags := e[fieldFlags]; hasFlags && r.flags&pagesPresent == 0 {
				return nil, fmt.Errorf("%s has pages with the unknown flags %#x", filepath.Base(path), r.flags)
			}
			offset += r.pages * pageSize
		}
		m.runs = append(m.runs, r)
	}
	return m, nil
}

// varints reads the fields of a message that are numbers.
func varints(data []byte) (map[protowire.Number]uint64, error) {
	out := make(map[protowire.Number]uint64, 4)
	for len(data) > 0 {
		number, kind, n := protowire.ConsumeTag(data)
		if n < 0 {
			return nil, protowire.ParseError(n)
		}
		data = data[n:]
		if kind != protowire.VarintType {
			return nil, fmt.Errorf("field %d has the unknown type %d", number, kind)
		}
		v, n := protowire.ConsumeVarint(data)
		if n < 0 {
			return nil, protowire.ParseError(n)
		}
		out[number], data = v, data[n:]
	}
	return out, nil
}

// resolve returns the runs of a round with those that are in its parent replaced by
// the parent's, which before lists in the order of their addresses.
func (m *pagemap) resolve(round int, before []pageRun) ([]pageRun, error) {
	var out []pageRun
	for _, r := range m.runs {
		if r.flags&pagesInParent == 0 {
			r.round = round
			out = append(out, r)
			continue
		}
		for at := r.address; at < r.end(); {
			for len(before) > 0 && before[0].end() <= at {
				before = before[1:]
			}
			if len(before) == 0 || before[0].address > at {
				return nil, fmt.Errorf("the page at %#x is in no pre-dump", at)
			}
			part := before[0]
			skip := at - part.address
			part.address, part.offset = at, part.offset+skip
			part.pages = (min(before[0].end(), r.end()) - at) / pageSize
			out = append(out, part)
			at = part.end()
		}
	}
	for i := 1; i < len(out); i++ {
		if out[i].address < out[i-1].end() {
			return nil, fmt.Errorf("the pages at %#x are not in order", out[i].address)
		}
	}
	return out, nil
}

// write writes the list with other runs, all of which have content.
func (m *pagemap) write(path string, runs []pageRun) error {
	var merged []pageRun
	for _, r := range runs {
		if i := len(merged) - 1; i >= 0 && merged[i].end() == r.address && merged[i].flags == r.flags && merged[i].pages+r.pages <= math.MaxUint32 {
			merged[i].pages += r.pages
		} else {
			merged = append(merged, r)
		}
	}
	entries := m.image.entries[:1:1]
	for _, r := range merged {
		var e []byte
		number := func(field protowire.Number, v uint64) {
			e = protowire.AppendVarint(protowire.AppendTag(e, field, protowire.VarintType), v)
		}
		number(fieldAddress, r.address)
		number(fieldPages, min(r.pages, math.MaxUint32))
		number(fieldFlags, r.flags|pagesPresent)
		if m.wide {
			number(fieldPages64, r.pages)
		}
		entries = append(entries, e)
	}
	image := &entriesImage{magic: m.image.magic, entries: entries}
	return image.write(path)
}
