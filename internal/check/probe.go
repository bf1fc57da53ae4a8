// SPDX-License-Identifier: Apache-2.0

package check

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
)

// Files by which the container of check --guest and the host talk, below its root.
const (
	fromHostName = "from-host"
	toHostName   = "ready/to-host"
	readyName    = "ready/ready"
	readyTemp    = "ready/ready.tmp"
)

// transferBytes is the size of the files that the container reads and writes. Tests
// have smaller ones.
var transferBytes = 32 << 20

const (
	// probeBytes is the memory that the container fills.
	probeBytes = 64 << 20
	// maxAnswer bounds what it answers, in bytes.
	maxAnswer = 64 << 10
)

// transfer is a file that has crossed virtiofs.
type transfer struct {
	// Time is how long it took, in nanoseconds.
	Time time.Duration `json:"time"`
	// Sum is the CRC-32 (Castagnoli) of what was read or written.
	Sum uint32 `json:"sum"`
}

// rate is in MiB a second.
func (t transfer) rate() float64 {
	return float64(transferBytes>>20) / max(t.Time, time.Microsecond).Seconds()
}

// probed is the answer of the container of check --guest.
type probed struct {
	Read    transfer `json:"read"`
	Written transfer `json:"written"`
	// Lacks are the options of [KernelOptions] that the guest's kernel lacks, Unknown
	// those that cannot be tried in a container.
	Lacks   []string `json:"lacks"`
	Unknown []string `json:"unknown"`
}

// Probe is what runs in the guest: it fills memory, tries what it can of the
// guest, answers in a file, and waits until it is killed.
func Probe(ctx context.Context) error {
	memory := noise(probeBytes)
	if err := answerIn("/"); err != nil {
		return err
	}
	<-ctx.Done()
	runtime.KeepAlive(memory)
	return nil
}

// answerIn tries the guest and answers in the container's root.
func answerIn(root string) error {
	var a probed
	var err error
	if a.Read, err = readTransfer(filepath.Join(root, fromHostName)); err != nil {
		return err
	}
	if a.Written, err = writeTransfer(filepath.Join(root, toHostName)); err != nil {
		return err
	}
	a.Lacks, a.Unknown = tryOptions()
	data, err := json.Marshal(a)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(root, readyTemp), data, 0o600); err != nil {
		return err
	}
	return os.Rename(filepath.Join(root, readyTemp), filepath.Join(root, readyName))
}

// noise is memory that can neither be left out nor compressed, of a multiple of 8
// bytes.
func noise(size int) []byte {
	memory := make([]byte, size)
	state := uint64(88172645463325252) // xorshift
	for word := range slices.Chunk(memory, 8) {
		state ^= state << 13
		state ^= state >> 7
		state ^= state << 17
		binary.NativeEndian.PutUint64(word, state)
	}
	return memory
}

// castagnoli is what processors have instructions for.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func readTransfer(path string) (t transfer, err error) {
	f, err := os.Open(path)
	if err != nil {
		return t, err
	}
	defer f.Close()
	data := make([]byte, transferBytes)
	clear(data) // no page fault counts
	begin := time.Now()
	n, err := io.ReadFull(f, data)
	t.Time = time.Since(begin)
	t.Sum = crc32.Checksum(data[:n], castagnoli)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		err = nil // its sum tells
	}
	return t, err
}

func writeTransfer(path string) (t transfer, err error) {
	data := noise(transferBytes)
	t.Sum = crc32.Checksum(data, castagnoli)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return t, err
	}
	begin := time.Now()
	_, err = f.Write(data)
	err = errclass.Join(err, f.Close())
	t.Time = time.Since(begin)
	return t, err
}

// readAnswer reads the answer of a container, on the host: its sums are what the
// host has written and what has arrived there.
func readAnswer(root string) (a probed, err error) {
	dir, err := os.OpenRoot(root)
	if err != nil {
		return a, err
	}
	defer dir.Close()
	f, err := dir.Open(readyName)
	if err != nil {
		return a, err
	}
	defer f.Close()
	if err := json.NewDecoder(io.LimitReader(f, maxAnswer)).Decode(&a); err != nil {
		return a, fmt.Errorf("read the answer of the container: %w", err)
	}
	return a, nil
}

// arrived is the sum of a file of the container's, which may be as large as it
// should be.
func arrived(root, name string) (uint32, error) {
	dir, err := os.OpenRoot(root)
	if err != nil {
		return 0, err
	}
	defer dir.Close()
	f, err := dir.Open(name)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	sum := crc32.New(castagnoli)
	_, err = io.Copy(sum, io.LimitReader(f, int64(transferBytes)+1))
	return sum.Sum32(), err
}
