// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
)

const mib = 1 << 20

// memory holds random data and verifies its checksums in every round. A part of
// the data changes in each round, so that an old image set cannot pass for a
// new one.
type memory struct {
	mib, shmMiB int
	shm         string

	blocks, shmBlocks []uint64 // checksums, one for each MiB
	data              [][]byte
	file              *os.File
	buffer            []byte
	random            *rand.PCG
	n                 int
}

func (m *memory) fill() error {
	m.random = rand.NewPCG(rand.Uint64(), rand.Uint64())
	m.buffer = make([]byte, mib)
	for range m.mib {
		block := make([]byte, mib)
		m.blocks = append(m.blocks, m.fillBlock(block))
		m.data = append(m.data, block)
	}
	var err error
	if m.file, err = os.OpenFile(m.shm, os.O_CREATE|os.O_TRUNC|os.O_RDWR, 0o600); err != nil {
		return err
	}
	m.shmBlocks = make([]uint64, m.shmMiB)
	for i := range m.shmBlocks {
		if err := m.fillShm(i); err != nil {
			return err
		}
	}
	return nil
}

func (m *memory) fillShm(i int) error {
	m.shmBlocks[i] = m.fillBlock(m.buffer)
	_, err := m.file.WriteAt(m.buffer, int64(i)*mib)
	return err
}

func (m *memory) fillBlock(block []byte) uint64 {
	for i := 0; i < len(block); i += 8 {
		binary.LittleEndian.PutUint64(block[i:], m.random.Uint64())
	}
	return checksum(block)
}

func (m *memory) round(w io.Writer) error {
	for i, block := range m.data {
		if checksum(block) != m.blocks[i] {
			return fmt.Errorf("memory has changed in MiB %d of %d", i, m.mib)
		}
	}
	for i, want := range m.shmBlocks {
		if _, err := m.file.ReadAt(m.buffer, int64(i)*mib); err != nil {
			return err
		}
		if checksum(m.buffer) != want {
			return fmt.Errorf("%s has changed in MiB %d of %d", m.shm, i, m.shmMiB)
		}
	}
	m.n++
	if m.mib > 0 {
		i := m.n % m.mib
		m.blocks[i] = m.fillBlock(m.data[i])
	}
	if m.shmMiB > 0 {
		if err := m.fillShm(m.n % m.shmMiB); err != nil {
			return err
		}
	}
	_, err := fmt.Fprintf(w, "round %d memory %d shm %d\n", m.n, m.mib, m.shmMiB)
	return err
}

// checksum depends on every bit of a block and on the order of its words: each
// step is a bijection of the sum for a given word, and of the word for a given
// sum. It is cheap, because the guest's CPU may be emulated.
func checksum(block []byte) uint64 {
	sum := uint64(len(block))
	for i := 0; i+8 <= len(block); i += 8 {
		sum = (sum ^ binary.LittleEndian.Uint64(block[i:])) * 0x9e3779b97f4a7c15
		sum ^= sum >> 29
	}
	return sum
}
