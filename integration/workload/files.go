// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// openFiles keeps files open in all the places that a container has. In every
// round it appends a record to each and reads all records back, through the
// descriptors that it opened at the start. A file of the volume is mapped and
// closed; it holds the round's number.
type openFiles struct {
	volume, root, shm, deleted string
	mapped                     string
	constant                   []string

	growing []*recordFile
	fixed   []*fixedFile
	memory  []byte
	n       int
}

func (o *openFiles) open() error {
	for _, path := range []string{o.volume, o.root, o.shm, o.deleted} {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_RDWR|os.O_APPEND, 0o644)
		if err != nil {
			return err
		}
		o.growing = append(o.growing, &recordFile{path: path, f: f})
	}
	if err := os.Remove(o.deleted); err != nil {
		return err
	}
	for _, path := range o.constant {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		content, err := io.ReadAll(f)
		if err != nil {
			return err
		}
		o.fixed = append(o.fixed, &fixedFile{path: path, f: f, content: content})
	}
	return o.mapFile()
}

func (o *openFiles) mapFile() error {
	f, err := os.OpenFile(o.mapped, os.O_CREATE|os.O_TRUNC|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(int64(os.Getpagesize())); err != nil {
		return err
	}
	o.memory, err = unix.Mmap(int(f.Fd()), 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	return err
}

func (o *openFiles) round(w io.Writer) error {
	for _, f := range o.growing {
		if err := f.verify(o.n); err != nil {
			return err
		}
	}
	for _, f := range o.fixed {
		if err := f.verify(); err != nil {
			return err
		}
	}
	if _, err := os.Stat(o.deleted); err == nil {
		return fmt.Errorf("%s was deleted and has a name again", o.deleted)
	}
	if n := binary.LittleEndian.Uint64(o.memory); n != uint64(o.n) {
		return fmt.Errorf("%s has round %d in place of %d", o.mapped, n, o.n)
	}
	o.n++
	binary.LittleEndian.PutUint64(o.memory, uint64(o.n))
	for _, f := range o.growing {
		if _, err := f.f.Write(f.record(o.n)); err != nil {
			return err
		}
	}
	_, err := fmt.Fprintf(w, "round %d files %d\n", o.n, len(o.growing)+len(o.fixed))
	return err
}

// recordFile is a file with a record for each round.
type recordFile struct {
	path string
	f    *os.File
}

// record returns a record of fixed length, unique to the round and the file.
func (r *recordFile) record(n int) []byte {
	return fmt.Appendf(nil, "%08d %08x\n", n, crc32.ChecksumIEEE(fmt.Append(nil, r.path, n)))
}

func (r *recordFile) verify(n int) error {
	var want []byte
	for i := 1; i <= n; i++ {
		want = append(want, r.record(i)...)
	}
	return sameContent(r.path, r.f, want)
}

// fixedFile is read through its descriptor and by its path: the path shows a
// missing mount, the descriptor a wrong file.
type fixedFile struct {
	path    string
	f       *os.File
	content []byte
}

func (x *fixedFile) verify() error {
	if err := sameContent(x.path, x.f, x.content); err != nil {
		return err
	}
	f, err := os.Open(x.path)
	if err != nil {
		return err
	}
	defer f.Close()
	return sameContent(x.path, f, x.content)
}

func sameContent(path string, f *os.File, want []byte) error {
	have := make([]byte, len(want)+1)
	n, err := f.ReadAt(have, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if bytes.Equal(have[:n], want) {
		return nil
	}
	at := 0
	for at < n && at < len(want) && have[at] == want[at] {
		at++
	}
	return fmt.Errorf("%s has %d bytes or more in place of %d, and is another from byte %d on", path, n, len(want), at)
}
