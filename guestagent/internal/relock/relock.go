// SPDX-License-Identifier: Apache-2.0

// Package relock sets POSIX file locks of restored processes again. Such a lock
// ends when its process closes any descriptor of the file. CRIU sets the locks, and
// then maps files by descriptors that it closes (criu/cr-restore.c,
// restore_one_alive_task): a process that maps a file on which it has a lock, as
// SQLite does with the index of a write-ahead log, comes back without the lock.
//
// Nobody but the process can set its locks. So it is stopped, with all of its
// threads, and made to call fcntl, before it executes an instruction of its own.
//
// Written against Linux 6.18 and CRIU 4.2.
package relock

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/thread"
)

// Lock is a POSIX lock.
type Lock struct {
	FD int
	// Type is F_RDLCK or F_WRLCK.
	Type int16
	// Start and Len are in bytes; a length of 0 is up to the end of the file.
	Start, Length int64
}

// Lost returns those locks that a process does not have.
func Lost(pid int, locks []Lock) (out []Lock) {
	for _, l := range locks {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/%d", pid, l.FD))
		if err != nil || !has(string(data), l) {
			out = append(out, l)
		}
	}
	return out
}

// has looks for a lock in fdinfo: lines such as
// "lock: 1: POSIX ADVISORY WRITE 17 00:2d:5 0 EOF".
func has(fdinfo string, l Lock) bool {
	kind := "READ"
	if l.Type == unix.F_WRLCK {
		kind = "WRITE"
	}
	for line := range strings.Lines(fdinfo) {
		rest, ok := strings.CutPrefix(line, "lock:")
		f := strings.Fields(rest)
		if !ok || len(f) != 8 || f[1] != "POSIX" || f[3] != kind {
			continue
		}
		start, err := strconv.ParseInt(f[6], 10, 64)
		if err != nil || start > l.Start {
			continue
		}
		if f[7] == "EOF" {
			return true
		}
		end, err := strconv.ParseInt(f[7], 10, 64)
		if err == nil && l.Length > 0 && l.Start+l.Length-1 <= end {
			return true
		}
	}
	return false
}

// Process has a process set locks. It is frozen, and run has it thawed while it
// calls a function: its threads are stopped then.
func Process(pid int, locks []Lock, run func(while func() error) error) error {
	return thread.Do(func() error { return set(pid, locks, run) }) // ptrace belongs to a thread
}

func set(pid int, locks []Lock, run func(while func() error) error) (err error) {
	threads, err := stopAll(pid)
	defer func() {
		for _, tid := range threads {
			if e := unix.PtraceDetach(tid); e != nil && !errors.Is(e, unix.ESRCH) {
				err = errclass.Join(err, os.NewSyscallError("ptrace", e))
			}
		}
	}()
	if err != nil {
		return err
	}
	return run(func() (err error) {
		p, err := open(pid)
		if err != nil {
			return err
		}
		defer func() { err = errclass.Join(err, p.close()) }()
		for _, l := range locks {
			if err := p.set(l); err != nil {
				return fmt.Errorf("lock %d bytes from %d on of descriptor %d: %w", l.Length, l.Start, l.FD, err)
			}
		}
		return nil
	})
}

// stopAll stops the threads of a process by ptrace, and returns those that it has
// seized. If this process exits, they are killed.
func stopAll(pid int) (threads []int, err error) {
	seized := make(map[int]bool)
	for again := true; again; {
		again = false // until no thread is new
		entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
		if err != nil {
			return threads, err
		}
		for _, e := range entries {
			tid, err := strconv.Atoi(e.Name())
			if err != nil || seized[tid] {
				continue
			}
			if _, _, e := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_SEIZE, uintptr(tid), 0, unix.PTRACE_O_EXITKILL|unix.PTRACE_O_TRACESYSGOOD, 0, 0); e != 0 {
				if e == unix.ESRCH {
					continue // it has exited
				}
				return threads, os.NewSyscallError("ptrace", e)
			}
			seized[tid], again = true, true
			threads = append(threads, tid)
			if err := unix.PtraceInterrupt(tid); err != nil {
				return threads, os.NewSyscallError("ptrace", err)
			}
			if _, err := waitStop(tid); err != nil {
				return threads, err
			}
		}
	}
	return threads, nil
}

// waitStop waits until a traced thread has stopped.
func waitStop(tid int) (ws unix.WaitStatus, err error) {
	for {
		_, err := unix.Wait4(tid, &ws, unix.WALL, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return ws, os.NewSyscallError("wait4", err)
		}
		if !ws.Stopped() {
			return ws, errors.New("it has exited")
		}
		return ws, nil
	}
}

// process is one whose threads are stopped. Its first one executes calls.
type process struct {
	pid int
	mem *os.File
	// call is the address of an instruction that enters the kernel, and buffer that
	// of memory for a struct flock, whose content is saved.
	call, buffer uint64
	saved        []byte
	mask         uint64
	state        registers
}

// flock is struct flock of 64-bit machines (asm-generic/fcntl.h).
type flock struct {
	Type   int16
	Whence int16
	_      int32
	Start  int64
	Len    int64
	PID    int32
	_      int32
}

func open(pid int) (p *process, err error) {
	p = &process{pid: pid}
	if p.mem, err = os.OpenFile(fmt.Sprintf("/proc/%d/mem", pid), os.O_RDWR, 0); err != nil {
		return nil, err
	}
	if err := p.prepare(); err != nil {
		return nil, errclass.Join(err, p.mem.Close())
	}
	return p, nil
}

func (p *process) prepare() error {
	if err := p.findMemory(); err != nil {
		return err
	}
	p.saved = make([]byte, binary.Size(flock{}))
	if _, err := p.mem.ReadAt(p.saved, int64(p.buffer)); err != nil { //nolint:gosec // an address in user space
		return err
	}
	if err := p.state.read(p.pid); err != nil {
		return err
	}
	p.state.settle()
	// Signals that are pending wait until it runs on its own.
	if err := p.signalMask(unix.PTRACE_GETSIGMASK, &p.mask); err != nil {
		return err
	}
	all := ^uint64(0)
	return p.signalMask(unix.PTRACE_SETSIGMASK, &all)
}

// close leaves the process as it was.
func (p *process) close() error {
	err := errclass.Join(p.signalMask(unix.PTRACE_SETSIGMASK, &p.mask), p.state.write(p.pid))
	_, werr := p.mem.WriteAt(p.saved, int64(p.buffer)) //nolint:gosec // an address in user space
	return errclass.Join(err, werr, p.mem.Close())
}

// findMemory looks for the instruction in the vDSO, which every process has, and
// for memory that is its own.
func (p *process) findMemory() error {
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", p.pid))
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(maps)) {
		fields := strings.Fields(line)
		if len(fields) < 5 {
			continue
		}
		from, to, _ := strings.Cut(fields[0], "-")
		start, err := strconv.ParseUint(from, 16, 64)
		if err != nil {
			return err
		}
		end, err := strconv.ParseUint(to, 16, 64)
		if err != nil {
			return err
		}
		switch {
		case len(fields) == 6 && fields[5] == "[vdso]":
			code := make([]byte, end-start)
			if _, err := p.mem.ReadAt(code, int64(start)); err != nil { //nolint:gosec // an address in user space
				return err
			}
			if i := bytes.Index(code, enterKernel); i >= 0 {
				p.call = start + uint64(i)
			}
		case p.buffer == 0 && fields[1] == "rw-p" && (len(fields) == 5 || fields[5] == "[heap]" || fields[5] == "[stack]"):
			p.buffer = start
		}
	}
	if p.call == 0 || p.buffer == 0 {
		return errors.New("it has no vDSO, or no memory of its own")
	}
	return nil
}

func (p *process) signalMask(request int, mask *uint64) error {
	if e := ptraceMask(request, p.pid, mask); e != 0 {
		return os.NewSyscallError("ptrace", e)
	}
	return nil
}

// set has the process call fcntl(FD, F_SETLK, &lock).
func (p *process) set(l Lock) error {
	var data bytes.Buffer
	if err := binary.Write(&data, binary.NativeEndian, flock{Type: l.Type, Whence: unix.SEEK_SET, Start: l.Start, Len: l.Length}); err != nil {
		return err
	}
	if _, err := p.mem.WriteAt(data.Bytes(), int64(p.buffer)); err != nil { //nolint:gosec // an address in user space
		return err
	}
	regs := p.state
	regs.prepareCall(p.call, unix.SYS_FCNTL, uint64(l.FD), unix.F_SETLK, p.buffer) //nolint:gosec // a descriptor
	if err := regs.write(p.pid); err != nil {
		return err
	}
	for range 2 { // into the call, and out of it
		if err := p.runToCall(); err != nil {
			return err
		}
	}
	if err := regs.read(p.pid); err != nil {
		return err
	}
	if e := regs.result(); e < 0 {
		return os.NewSyscallError("fcntl", unix.Errno(-e))
	}
	return nil
}

// maxStops bounds what a process can stop for besides its call.
const maxStops = 100

// runToCall lets the first thread run until it is at the beginning or the end of
// a call.
func (p *process) runToCall() error {
	signal := 0
	for range maxStops {
		if err := unix.PtraceSyscall(p.pid, signal); err != nil {
			return os.NewSyscallError("ptrace", err)
		}
		ws, err := waitStop(p.pid)
		if err != nil {
			return err
		}
		const syscallStop = unix.SIGTRAP | 0x80
		switch signal = 0; {
		case ws.StopSignal() == syscallStop:
			return nil
		case ws.TrapCause() == unix.PTRACE_EVENT_STOP, ws>>16 != 0:
			// Of a process that job control has stopped, and that is again when it
			// is let go.
		default:
			signal = int(ws.StopSignal()) // SIGSTOP, which no mask blocks
		}
	}
	return errors.New("it does not come to its call")
}
