#include "textflag.h"

// start finds argc and argv at the stack pointer. What is none of its modes
// goes on as any Go program does.
TEXT ·start(SB), NOSPLIT|NOFRAME, $0
	CMPQ 0(SP), $2
	JLT  runtime
	MOVQ 16(SP), AX

	CMPL 0(AX), $0x63657865 // "exec", and the token
	JNE  notexec
	CMPB 4(AX), $0
	JNE  runtime
	CMPQ 0(SP), $3
	JNE  runtime
	CALL prepare<>(SB)
	CALL ·help(SB)

notexec:
	CMPL 0(AX), $0x73726966 // "first"
	JNE  notfirst
	CMPW 4(AX), $0x0074
	JNE  runtime
	CMPQ 0(SP), $2
	JNE  runtime
	CALL prepare<>(SB)
	CALL ·reap(SB)

notfirst:
	CMPL 0(AX), $0x77617073 // "spawn"
	JNE  runtime
	CMPW 4(AX), $0x006e
	JNE  runtime
	CMPQ 0(SP), $2
	JNE  runtime
	CALL prepare<>(SB)
	CALL ·spawn(SB)

runtime:
	JMP _rt0_amd64_linux(SB)

// prepare makes what Go's code expects: the current goroutine, just below the
// thread's FS base. This one has no stack limit, so that no function tries to
// grow the stack.
TEXT prepare<>(SB), NOSPLIT|NOFRAME, $0
	LEAQ ·tls+8(SB), SI
	LEAQ ·goroutine(SB), AX
	MOVQ AX, -8(SI)
	MOVQ $0x1002, DI // ARCH_SET_FS
	MOVQ $158, AX    // arch_prctl
	SYSCALL
	RET
