// SPDX-License-Identifier: Apache-2.0

package relock

import (
	"os"

	"golang.org/x/sys/unix"
)

// enterKernel is the instruction syscall.
var enterKernel = []byte{0x0f, 0x05}

type registers struct{ unix.PtraceRegsAmd64 }

func (r *registers) read(tid int) error {
	return os.NewSyscallError("ptrace", unix.PtraceGetRegsAmd64(tid, &r.PtraceRegsAmd64))
}

func (r *registers) write(tid int) error {
	return os.NewSyscallError("ptrace", unix.PtraceSetRegsAmd64(tid, &r.PtraceRegsAmd64))
}

// prepareCall has a thread make a system call. Whatever it was stopped in is not
// restarted by that.
func (r *registers) prepareCall(at, number, a, b, c uint64) {
	r.Rip, r.Rax, r.Orig_rax, r.Rdi, r.Rsi, r.Rdx = at, number, ^uint64(0), a, b, c
}

// settle has a call that was interrupted begin again, as the kernel does when
// nothing else is executed before (arch/x86/kernel/signal.c).
func (r *registers) settle() {
	const (
		restartIntr   = -513 // ERESTARTNOINTR
		restartSys    = -512 // ERESTARTSYS
		restartNoHand = -514 // ERESTARTNOHAND
		restartBlock  = -516 // ERESTART_RESTARTBLOCK
		size          = 2
	)
	if int64(r.Orig_rax) < 0 { //nolint:gosec // as the kernel means it
		return
	}
	switch r.result() {
	case restartIntr, restartSys, restartNoHand:
		r.Rax = r.Orig_rax
	case restartBlock:
		r.Rax = unix.SYS_RESTART_SYSCALL
	default:
		return
	}
	r.Rip -= size
	r.Orig_rax = ^uint64(0)
}

// result is what the call has returned; negative: an error.
func (r *registers) result() int64 { return int64(r.Rax) } //nolint:gosec // as the kernel means it
