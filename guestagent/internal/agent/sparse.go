// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
)

// archive/tar reads the holes of a sparse file as zeros, as many as the archive
// says there are. So the parts of a file that have data are found here, from what
// archive/tar has read of the file's header: GNU tar's PAX format 1.0, in which the
// archives are, has the list of them right before the data.

// blockSize is the size of tar's blocks in bytes.
const blockSize = 512

// archiveReader remembers what was read since begin.
type archiveReader struct {
	f    *os.File
	read []byte
}

func (r *archiveReader) begin() { r.read = r.read[:0] }

// Read implements io.Reader.
func (r *archiveReader) Read(p []byte) (int, error) {
	n, err := r.f.Read(p)
	r.read = append(r.read, p[:n]...)
	return n, err
}

// Seek implements io.Seeker, by which archive/tar skips content.
func (r *archiveReader) Seek(offset int64, whence int) (int64, error) {
	return r.f.Seek(offset, whence)
}

// part is a part of a file with data, size bytes at an offset, which are at a
// position of the archive.
type part struct{ offset, size, at int64 }

// parts returns the parts of a file whose header has just been read.
func (r *archiveReader) parts(h *tar.Header) ([]part, error) {
	at, err := r.f.Seek(0, io.SeekCurrent)
	if err != nil {
		return nil, err
	}
	switch major, minor := h.PAXRecords["GNU.sparse.major"], h.PAXRecords["GNU.sparse.minor"]; {
	case major == "1" && minor == "0":
		return parseParts(r.read, h.Size, at)
	case hasSparseRecord(h):
		return nil, fmt.Errorf("a sparse file of an unknown format %q.%q", major, minor)
	}
	return []part{{0, h.Size, at}}, nil
}

func hasSparseRecord(h *tar.Header) bool {
	for key := range h.PAXRecords {
		if strings.HasPrefix(key, "GNU.sparse.") {
			return true
		}
	}
	return false
}

// parseParts reads the list of parts at the end of what was read of the archive:
// decimal numbers with a line feed after each, first that of parts, then the offset
// and size of each. The last block is filled up with zeros.
func parseParts(read []byte, size, at int64) ([]part, error) {
	begin := len(read)
	for begin >= blockSize && isList(read[begin-blockSize:begin]) {
		begin -= blockSize
	}
	fields := strings.Fields(string(bytes.ReplaceAll(read[begin:], []byte{0}, []byte{' '})))
	numbers := make([]int64, len(fields))
	for i, field := range fields {
		n, err := strconv.ParseInt(field, 10, 64)
		if err != nil {
			return nil, fmt.Errorf("the list of a sparse file's parts: %w", err)
		}
		numbers[i] = n
	}
	wrong := errors.New("the list of a sparse file's parts is damaged")
	if len(numbers) == 0 || int64(len(numbers)-1) != 2*numbers[0] {
		return nil, wrong
	}
	var parts []part
	end := int64(0)
	for list := numbers[1:]; len(list) > 0; list = list[2:] {
		p := part{offset: list[0], size: list[1], at: at}
		if p.offset < end || p.size < 0 || p.offset > size || p.size > size-p.offset {
			return nil, wrong
		}
		end, at = p.offset+p.size, at+p.size
		parts = append(parts, p)
	}
	return parts, nil
}

// isList reports whether a block may be one of a list of parts: a header has
// letters.
func isList(block []byte) bool {
	return bytes.IndexFunc(block, func(r rune) bool { return r != 0 && r != '\n' && (r < '0' || r > '9') }) < 0
}
