// SPDX-License-Identifier: Apache-2.0

package launch

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/tcprepair"
)

// EndSignal has the guard kill its CRIU. To kill the guard would kill CRIU as
// well, but nobody would see to the connections then.
const EndSignal = unix.SIGTERM

// Guarded runs CRIU as a child instead of executing it. When CRIU is killed in a
// dump, by whomever, the processes that it dumps run on at once, before anybody
// can freeze them, and their connections are in repair mode: each read and write
// would fail. So CRIU is traced, which stops it at the beginning of its end, while
// it still holds the processes, and the connections leave repair mode first.
//
// It returns only on an error.
func Guarded(path string, args, env []string, sockets []Socket) error {
	end := make(chan os.Signal, 1)
	signal.Notify(end, EndSignal)
	pidfd := -1
	pid, err := syscall.ForkExec(path, append([]string{"criu"}, args[1:]...), &syscall.ProcAttr{
		Env: env, Files: []uintptr{0, 1, 2, ServiceFD, ServiceFD + 1}, Sys: &syscall.SysProcAttr{PidFD: &pidfd},
	})
	if err != nil {
		return fmt.Errorf("start %s: %w", path, err)
	}
	go func() {
		<-end
		_ = unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0)
	}()
	// In a list of the guest's processes this one would be called criu, too.
	_ = os.WriteFile("/proc/self/comm", []byte("criu-guard"), 0)
	// The end of CRIU's descriptors is how the agent learns of CRIU's.
	for _, fd := range []int{ServiceFD, ServiceFD + 1} {
		unix.Close(fd)
	}
	ws, err := trace(pid, func() {
		for _, s := range sockets {
			// The agent does it again, and reports what fails.
			_ = tcprepair.With(s.PID, s.FD, tcprepair.Leave)
		}
	})
	switch {
	case err != nil:
		_ = unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0)
		return err
	case ws.Signaled() && ws.Signal() == unix.SIGKILL:
		_ = unix.Kill(os.Getpid(), unix.SIGKILL)
	case ws.Signaled():
		os.Exit(128 + int(ws.Signal()))
	}
	os.Exit(ws.ExitStatus())
	return nil
}

// trace traces a child of this process's until it has exited, and calls ending
// when it is about to, for whatever reason. If this process dies, the child is
// killed. The calling goroutine is locked to its thread.
func trace(pid int, ending func()) (ws unix.WaitStatus, err error) {
	// A child that has exited already has a status all the same.
	if err := ptrace(unix.PTRACE_SEIZE, pid, unix.PTRACE_O_TRACEEXIT|unix.PTRACE_O_EXITKILL); err != nil && !errors.Is(err, unix.ESRCH) {
		return 0, os.NewSyscallError("ptrace", err)
	}
	for {
		if _, err := unix.Wait4(pid, &ws, unix.WALL, nil); errors.Is(err, unix.EINTR) {
			continue
		} else if err != nil {
			return ws, os.NewSyscallError("wait4", err)
		}
		if ws.Exited() || ws.Signaled() {
			return ws, nil
		}
		request, signal := unix.PTRACE_CONT, 0
		switch event := int(ws) >> 16; {
		case event == unix.PTRACE_EVENT_EXIT:
			ending()
		case event == unix.PTRACE_EVENT_STOP && ws.StopSignal() != unix.SIGTRAP:
			request = unix.PTRACE_LISTEN // it remains stopped until a SIGCONT
		case event == 0:
			signal = int(ws.StopSignal())
		}
		if err := ptrace(request, pid, signal); err != nil && !errors.Is(err, unix.ESRCH) {
			return ws, os.NewSyscallError("ptrace", err)
		}
	}
}

// ptrace makes a request whose address is not used.
func ptrace(request, pid, data int) error {
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, uintptr(request), uintptr(pid), 0, uintptr(data), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}
