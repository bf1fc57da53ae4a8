// SPDX-License-Identifier: Apache-2.0

package relock

import (
	"os"

	"golang.org/x/sys/unix"
)

// enterKernel is the instruction svc #0.
var enterKernel = []byte{0x01, 0x00, 0x00, 0xd4}

type registers struct{ unix.PtraceRegsArm64 }

const generalRegisters = 1 // NT_PRSTATUS

func (r *registers) read(tid int) error {
	return os.NewSyscallError("ptrace", unix.PtraceGetRegSetArm64(tid, generalRegisters, &r.PtraceRegsArm64))
}

func (r *registers) write(tid int) error {
	return os.NewSyscallError("ptrace", unix.PtraceSetRegSetArm64(tid, generalRegisters, &r.PtraceRegsArm64))
}

// prepareCall has a thread make a system call.
func (r *registers) prepareCall(at, number, a, b, c uint64) {
	r.Pc, r.Regs[8], r.Regs[0], r.Regs[1], r.Regs[2] = at, number, a, b, c
}

// settle does nothing: the kernel has a call that was interrupted begin again
// before it stops (arch/arm64/kernel/signal.c).
func (r *registers) settle() {}

// result is what the call has returned; negative: an error.
func (r *registers) result() int64 { return int64(r.Regs[0]) } //nolint:gosec // as the kernel means it
