// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// slots counts in its own slot of a file in /dev/shm that other processes have
// mapped as well, and in a file of its own there, which it keeps open. No other
// slot may ever decrease.
type slots struct {
	shared, own string
	slot        int

	memory []byte
	file   *os.File
	seen   [slotCount]uint64
	n      uint64
}

const (
	slotCount = 8
	ownSize   = 16 // bytes of the file of its own
)

func (s *slots) open() error {
	if s.slot < 0 || s.slot >= slotCount {
		return fmt.Errorf("no slot %d", s.slot)
	}
	shared, err := os.OpenFile(s.shared, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	defer shared.Close() // the mapping stays
	if err := shared.Truncate(int64(os.Getpagesize())); err != nil {
		return err
	}
	if s.memory, err = unix.Mmap(int(shared.Fd()), 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return err
	}
	if s.file, err = os.OpenFile(s.own, os.O_CREATE|os.O_TRUNC|os.O_RDWR, 0o644); err != nil {
		return err
	}
	return s.store()
}

func (s *slots) round(w io.Writer) error {
	content := make([]byte, ownSize)
	if _, err := s.file.ReadAt(content, 0); err != nil {
		return err
	}
	if own, err := strconv.ParseUint(strings.TrimSpace(string(content)), 10, 64); err != nil || own != s.n {
		return fmt.Errorf("memory has %d, %s has %q", s.n, s.own, content)
	}
	for i := range s.seen {
		now := s.read(i)
		if i == s.slot && now != s.n || now < s.seen[i] {
			return fmt.Errorf("memory has %d, slot %d of %s has %d and had %d", s.n, i, s.shared, now, s.seen[i])
		}
		s.seen[i] = now
	}
	s.n++
	if err := s.store(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(w, "round %d of slot %d, others %v\n", s.n, s.slot, s.seen)
	return err
}

func (s *slots) read(i int) uint64 { return binary.LittleEndian.Uint64(s.memory[8*i:]) }

func (s *slots) store() error {
	s.seen[s.slot] = s.n
	binary.LittleEndian.PutUint64(s.memory[8*s.slot:], s.n)
	_, err := s.file.WriteAt([]byte(fmt.Sprintf("%*d\n", ownSize-1, s.n)), 0)
	return err
}
