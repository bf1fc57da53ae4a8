// SPDX-License-Identifier: Apache-2.0

// Package criuimage reads what an operator wants to see of CRIU's images: the
// tree of processes, and the statistics of the dump. Only the command
// kata-checkpoint calls it, when it is asked to show a checkpoint; the shim
// parses no image.
//
// The images are those of a guest, which is not trusted: what is read is
// bounded, and the names in it are made fit to be printed.
//
// Written against CRIU 4.2 (criu/include/magic.h, images/*.proto).
package criuimage

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	criu_core "github.com/checkpoint-restore/go-criu/v7/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/pstree"
	"github.com/checkpoint-restore/go-criu/v7/stats"
	"google.golang.org/protobuf/proto"

	"github.com/kata-checkpoint/kata-checkpoint/internal/text"
)

// Magic numbers at the beginning of images.
const (
	imageMagic   = 0x54564319
	serviceMagic = 0x55105940
	pstreeMagic  = 0x50273030
	coreMagic    = 0x55053847
	statsMagic   = 0x57093306
)

// Bounds in bytes, and of processes.
const (
	MaxTree      = 16 << 20
	MaxCore      = 16 << 20
	MaxStats     = 64 << 10
	maxProcesses = 65536
)

// Process is one of a checkpoint's processes, with its children by PID.
type Process struct {
	// PID is that in the container.
	PID uint32 `json:"pid"`
	// Name is the process's own name, of at most 15 characters.
	Name     string     `json:"name"`
	Threads  int        `json:"threads"`
	Zombie   bool       `json:"zombie,omitempty"`
	Children []*Process `json:"children,omitempty"`
}

// zombie is a dead task's state (TASK_DEAD, images/core.proto).
const zombie = 2

// Tree reads the processes, by a function that reads an image of at most limit
// bytes by its name. They are in order of their PIDs.
func Tree(read func(name string, limit int64) ([]byte, error)) ([]*Process, error) {
	data, err := read("pstree.img", MaxTree)
	if err != nil {
		return nil, err
	}
	messages, err := split(data, imageMagic, pstreeMagic, maxProcesses)
	if err != nil {
		return nil, fmt.Errorf("pstree.img: %w", err)
	}
	processes, parents := map[uint32]*Process{}, map[uint32]uint32{}
	var order []uint32
	for _, m := range messages {
		entry := &pstree.PstreeEntry{}
		if err := lenient.Unmarshal(m, entry); err != nil {
			return nil, fmt.Errorf("pstree.img: %w", err)
		}
		pid := entry.GetPid()
		if processes[pid] != nil {
			return nil, fmt.Errorf("pstree.img: there are two processes with PID %d", pid)
		}
		p := &Process{PID: pid, Threads: len(entry.GetThreads())}
		if err := p.readCore(read); err != nil {
			return nil, err
		}
		processes[pid], parents[pid] = p, entry.GetPpid()
		order = append(order, pid)
	}
	slices.Sort(order)
	var roots []*Process
	for _, pid := range order {
		// A parent with a larger PID is possible, one that is its own descendant is
		// not.
		if parent := processes[parents[pid]]; parent != nil && !descends(parents[pid], pid, parents) {
			parent.Children = append(parent.Children, processes[pid])
		} else {
			roots = append(roots, processes[pid])
		}
	}
	return roots, nil
}

// descends reports whether a process is ancestor itself or one of its
// descendants.
func descends(pid, ancestor uint32, parents map[uint32]uint32) bool {
	for range len(parents) + 1 {
		if pid == ancestor {
			return true
		}
		parent, ok := parents[pid]
		if !ok {
			return false
		}
		pid = parent
	}
	return true // a ring
}

func (p *Process) readCore(read func(string, int64) ([]byte, error)) error {
	name := fmt.Sprintf("core-%d.img", p.PID)
	data, err := read(name, MaxCore)
	if err != nil {
		return err
	}
	messages, err := split(data, imageMagic, coreMagic, 1)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	core := &criu_core.CoreEntry{}
	if err := lenient.Unmarshal(messages[0], core); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	p.Name = text.Line(core.GetTc().GetComm(), text.MaxName)
	p.Zombie = core.GetTc().GetTaskState() == zombie
	return nil
}

// Stats are CRIU's statistics of a dump: times in microseconds.
type Stats struct {
	FreezingTime uint32 `json:"freezing_time"`
	FrozenTime   uint32 `json:"frozen_time"`
	MemdumpTime  uint32 `json:"memdump_time"`
	MemwriteTime uint32 `json:"memwrite_time"`
	PagesScanned uint64 `json:"pages_scanned"`
	PagesWritten uint64 `json:"pages_written"`
}

// ParseStats reads the content of stats-dump.
func ParseStats(data []byte) (*Stats, error) {
	messages, err := split(data, serviceMagic, statsMagic, 1)
	if err != nil {
		return nil, fmt.Errorf("stats-dump: %w", err)
	}
	entry := &stats.StatsEntry{}
	if err := lenient.Unmarshal(messages[0], entry); err != nil {
		return nil, fmt.Errorf("stats-dump: %w", err)
	}
	d := entry.GetDump()
	if d == nil {
		return nil, errors.New("stats-dump: it has no statistics of a dump")
	}
	return &Stats{
		FreezingTime: d.GetFreezingTime(), FrozenTime: d.GetFrozenTime(), MemdumpTime: d.GetMemdumpTime(), MemwriteTime: d.GetMemwriteTime(),
		PagesScanned: d.GetPagesScanned(), PagesWritten: d.GetPagesWritten(),
	}, nil
}

// lenient accepts messages without fields that a newer CRIU requires.
var lenient = proto.UnmarshalOptions{AllowPartial: true}

// split returns an image's messages, one at least: two magic numbers, and
// before each message its size.
func split(data []byte, first, second uint32, limit int) (messages [][]byte, err error) {
	const word = 4
	if len(data) < 2*word || binary.LittleEndian.Uint32(data) != first || binary.LittleEndian.Uint32(data[word:]) != second {
		return nil, errors.New("it is not an image of CRIU of this type")
	}
	for data = data[2*word:]; len(data) > 0 && len(messages) < limit; {
		if len(data) < word {
			return nil, errors.New("it is cut short")
		}
		size := binary.LittleEndian.Uint32(data)
		if data = data[word:]; int64(size) > int64(len(data)) {
			return nil, errors.New("it is cut short")
		}
		messages, data = append(messages, data[:size]), data[size:]
	}
	if len(messages) == 0 {
		return nil, errors.New("it is empty")
	}
	return messages, nil
}
