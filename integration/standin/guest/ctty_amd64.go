// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bytes"
	"fmt"
	"runtime"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// TerminalMode is the agent's helper mode that gives a process the terminal on
// its stdin. It is a separate process because the agent, which waits for all
// its children, would consume the tracer's stops.
const TerminalMode = "take-terminal"

// TakeTerminal makes a session leader take the terminal on its stdin as its
// controlling terminal, from outside: only the leader can, and runc's init does
// so only for runc's own terminals. args: PID. The process is blocked in a
// system call, waiting for its start.
func TakeTerminal(args []string) error {
	if len(args) != 1 {
		return fmt.Errorf("take the terminal: %d arguments", len(args))
	}
	pid, err := strconv.Atoi(args[0])
	if err != nil {
		return fmt.Errorf("take the terminal: %w", err)
	}
	// All ptrace calls must come from the thread that attached.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	// It may not have entered the system call yet.
	for deadline := time.Now().Add(2 * time.Second); ; {
		err = injectTakeTerminal(pid)
		if err == nil || time.Now().After(deadline) {
			break
		}
		time.Sleep(5 * time.Millisecond) //nolint:forbidigo // the pause between two checks
	}
	if err != nil {
		return fmt.Errorf("take the terminal for process %d: %w", pid, err)
	}
	return nil
}

var syscallInstruction = []byte{0x0f, 0x05}

// injectTakeTerminal reuses the system call instruction at which the process is
// stopped.
func injectTakeTerminal(pid int) (err error) {
	if err := unix.PtraceSeize(pid); err != nil {
		return fmt.Errorf("seize: %w", err)
	}
	defer func() {
		if derr := unix.PtraceDetach(pid); derr != nil && err == nil {
			err = fmt.Errorf("detach: %w", derr)
		}
	}()
	if err := unix.PtraceInterrupt(pid); err != nil {
		return fmt.Errorf("interrupt: %w", err)
	}
	if err := waitStopped(pid); err != nil {
		return err
	}
	var saved unix.PtraceRegs
	if err := unix.PtraceGetRegs(pid, &saved); err != nil {
		return fmt.Errorf("read the registers: %w", err)
	}
	code := make([]byte, len(syscallInstruction))
	if _, err := unix.PtracePeekText(pid, uintptr(saved.Rip)-2, code); err != nil || !bytes.Equal(code, syscallInstruction) {
		return fmt.Errorf("the process is not in a system call (%x)", code)
	}
	call := saved
	call.Rip -= 2
	call.Rax, call.Rdi, call.Rsi, call.Rdx = unix.SYS_IOCTL, 0, unix.TIOCSCTTY, 0
	call.Orig_rax = ^uint64(0) // the interrupted call must not be restarted here
	if err := unix.PtraceSetRegs(pid, &call); err != nil {
		return fmt.Errorf("write the registers: %w", err)
	}
	result, err := step(pid)
	// With its own registers back the process restarts the call it was in.
	if rerr := unix.PtraceSetRegs(pid, &saved); rerr != nil {
		return fmt.Errorf("restore the registers: %w", rerr)
	}
	if err != nil {
		return err
	}
	if result < 0 {
		return unix.Errno(-result)
	}
	return nil
}

func step(pid int) (int64, error) {
	if err := unix.PtraceSingleStep(pid); err != nil {
		return 0, fmt.Errorf("step: %w", err)
	}
	if err := waitStopped(pid); err != nil {
		return 0, err
	}
	var regs unix.PtraceRegs
	if err := unix.PtraceGetRegs(pid, &regs); err != nil {
		return 0, fmt.Errorf("read the registers: %w", err)
	}
	return int64(regs.Rax), nil
}

func waitStopped(pid int) error {
	var status unix.WaitStatus
	if _, err := unix.Wait4(pid, &status, unix.WALL, nil); err != nil {
		return fmt.Errorf("wait for the stop: %w", err)
	}
	if !status.Stopped() {
		return fmt.Errorf("the process has exited, status %x", status)
	}
	return nil
}
