// SPDX-License-Identifier: Apache-2.0

// Package relock takes POSIX locks of restored processes again that CRIU has lost.
//
// CRIU 4.2 restores the locks of a process before it opens the files that the
// process has mapped (criu/cr-restore.c), and closes those again in the process.
// That releases all of its POSIX locks on them (fcntl(2)): those of SQLite's
// write-ahead log, for example. Such a lock belongs to the process, and nobody else
// can take it, so that the process is made to: it is stopped by ptrace, executes
// fcntl, and gets its registers back.
//
// Written for x86-64 and Linux 6.18.
package relock

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
)

// Lock is a POSIX lock of a process.
type Lock struct {
	// FD is a descriptor of the file.
	FD int
	// Type is F_RDLCK or F_WRLCK.
	Type int16
	// Start and Length are in bytes; a length of 0 is to the end of the file.
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

// Stopped are the threads of a process that ptrace has stopped.
type stopped struct {
	pid     int
	threads []int
}

// Process makes a process take locks. It is frozen, and run has it thawed while it
// calls a function: its threads are stopped then.
func Process(pid int, locks []Lock, run func(while func() error) error) error {
	done := make(chan error, 1)
	go func() {
		// A tracer is a thread. It ends with the goroutine.
		runtime.LockOSThread()
		done <- process(pid, locks, run)
	}()
	return <-done
}

func process(pid int, locks []Lock, run func(while func() error) error) (err error) {
	s := &stopped{pid: pid}
	defer func() {
		for _, tid := range s.threads {
			if e := unix.PtraceDetach(tid); e != nil && err == nil {
				err = fmt.Errorf("detach from thread %d: %w", tid, e)
			}
		}
	}()
	if err := s.stop(); err != nil {
		return err
	}
	return run(func() error {
		for _, l := range locks {
			if err := s.lock(l); err != nil {
				return fmt.Errorf("lock descriptor %d: %w", l.FD, err)
			}
		}
		return nil
	})
}

// stop stops all threads. No new one is made: they are frozen.
func (s *stopped) stop() error {
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", s.pid))
	if err != nil {
		return err
	}
	for _, e := range entries {
		tid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if _, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_SEIZE, uintptr(tid), 0, unix.PTRACE_O_TRACESYSGOOD, 0, 0); errno != 0 {
			return fmt.Errorf("trace thread %d: %w", tid, errno)
		}
		s.threads = append(s.threads, tid)
		if err := unix.PtraceInterrupt(tid); err != nil {
			return fmt.Errorf("stop thread %d: %w", tid, err)
		}
		if _, err := wait(tid); err != nil {
			return err
		}
	}
	return nil
}

func wait(tid int) (unix.WaitStatus, error) {
	var status unix.WaitStatus
	for {
		_, err := unix.Wait4(tid, &status, unix.WALL, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err == nil && !status.Stopped() {
			err = errors.New("it has exited")
		}
		if err != nil {
			return status, fmt.Errorf("wait for thread %d: %w", tid, err)
		}
		return status, nil
	}
}

const (
	// syscallStop is the signal of a stop at a system call (PTRACE_O_TRACESYSGOOD).
	syscallStop = unix.SIGTRAP | 0x80
	// redZone is what a program may use below its stack pointer, and more.
	redZone = 1024
	// codeSegment is CS of a program with 64 bits.
	codeSegment = 0x33
)

// syscallCode is the instruction, padded to a word.
var syscallCode = []byte{0x0f, 0x05}

// lock executes fcntl in the main thread.
func (s *stopped) lock(l Lock) (err error) {
	var regs unix.PtraceRegs
	if err := unix.PtraceGetRegs(s.pid, &regs); err != nil {
		return err
	}
	if regs.Cs != codeSegment {
		return errors.New("the program does not have 64 bits")
	}
	var flock [32]byte                                       // struct flock
	binary.LittleEndian.PutUint16(flock[0:], uint16(l.Type)) //nolint:gosec // small
	binary.LittleEndian.PutUint16(flock[2:], unix.SEEK_SET)
	binary.LittleEndian.PutUint64(flock[8:], uint64(l.Start))   //nolint:gosec // bits
	binary.LittleEndian.PutUint64(flock[16:], uint64(l.Length)) //nolint:gosec // bits
	at := (uintptr(regs.Rsp) - redZone) &^ 15
	var mask uint64
	if err := sigmask(unix.PTRACE_GETSIGMASK, s.pid, &mask); err != nil {
		return err
	}
	// Signals that are pending come later.
	all := ^uint64(0)
	code, stack := make([]byte, len(syscallCode)), make([]byte, len(flock))
	if _, err := unix.PtracePeekText(s.pid, uintptr(regs.Rip), code); err != nil {
		return err
	}
	if _, err := unix.PtracePeekData(s.pid, at, stack); err != nil {
		return err
	}
	defer func() {
		_, a := unix.PtracePokeText(s.pid, uintptr(regs.Rip), code)
		_, b := unix.PtracePokeData(s.pid, at, stack)
		err = errclass.Join(err, a, b, unix.PtraceSetRegs(s.pid, &regs), sigmask(unix.PTRACE_SETSIGMASK, s.pid, &mask))
	}()
	if err := sigmask(unix.PTRACE_SETSIGMASK, s.pid, &all); err != nil {
		return err
	}
	if _, err := unix.PtracePokeText(s.pid, uintptr(regs.Rip), syscallCode); err != nil {
		return err
	}
	if _, err := unix.PtracePokeData(s.pid, at, flock[:]); err != nil {
		return err
	}
	call := regs
	call.Rax, call.Orig_rax = unix.SYS_FCNTL, ^uint64(0)
	call.Rdi, call.Rsi, call.Rdx = uint64(l.FD), unix.F_SETLK, uint64(at) //nolint:gosec // a descriptor
	if err := unix.PtraceSetRegs(s.pid, &call); err != nil {
		return err
	}
	for range 2 { // into the call, and out of it
		if err := s.toSyscall(); err != nil {
			return err
		}
	}
	if err := unix.PtraceGetRegs(s.pid, &call); err != nil {
		return err
	}
	if result := int64(call.Rax); result < 0 { //nolint:gosec // an errno
		return unix.Errno(-result)
	}
	return nil
}

// maxStops bounds the stops on the way to a system call.
const maxStops = 100

func (s *stopped) toSyscall() error {
	for range maxStops {
		if err := unix.PtraceSyscall(s.pid, 0); err != nil {
			return err
		}
		status, err := wait(s.pid)
		if err != nil {
			return err
		}
		if status.StopSignal() == syscallStop {
			return nil
		}
	}
	return errors.New("it does not come to its system call")
}

func sigmask(request, tid int, mask *uint64) error {
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, uintptr(request), uintptr(tid), unsafe.Sizeof(*mask), uintptr(unsafe.Pointer(mask)), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}
