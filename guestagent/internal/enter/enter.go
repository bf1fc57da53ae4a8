// SPDX-License-Identifier: Apache-2.0

// Package enter starts a process inside the namespaces of another one, the time
// namespace included, which only a process with a single thread can join. Go's
// programs have many: so the work is done by a C program,
// kata-checkpoint-helper (guestagent/helper), to which this package writes a
// plan. The caller is root in the guest's root namespaces.
package enter

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"syscall"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/pidfd"
)

// The helper's argument: what it becomes.
const (
	commandMode = "enter"
	initMode    = "init"
)

// helperName is the first argument, which a container sees of an init.
const helperName = "kata-checkpoint-helper"

// Request is what to start and where.
type Request struct {
	// Target is the process whose namespaces are joined.
	Target int
	// Cgroup is the directory of the cgroup, of version 2, that the process
	// starts in.
	Cgroup string
	// Process is what the caller asked for, an OCI process: arguments,
	// environment, user, capabilities, limits, terminal. Without an OOM score of
	// its own it gets the target's.
	Process json.RawMessage
	// Init: the process is PID 1 of a new PID namespace, a child of the target's,
	// and does nothing but reap: Process has no command. It is a child of the
	// guest's init then.
	Init bool
}

// Descriptors of the helper, in this order after the process's stdio.
const (
	planFile   = iota // in memory
	reportPipe        // its write end
	targetPidfd
	cgroupDirectory
	files
)

// Prepared is a process that only lacks its stdio.
type Prepared struct {
	command string
	init    bool
	plan    []byte
	// fds are those of the helper, plain descriptors: stdio is of that kind.
	fds [files]int
	// report is the pipe's read end.
	report int
}

// Prepare does what can be done before the stdio is there. The caller has to
// call Close.
func Prepare(r Request) (*Prepared, error) {
	p := &Prepared{init: r.Init, report: -1}
	for i := range p.fds {
		p.fds[i] = -1
	}
	if err := p.open(r); err != nil {
		p.Close()
		return nil, fmt.Errorf("exec: %w", err)
	}
	return p, nil
}

func (p *Prepared) open(r Request) (err error) {
	process := &specs.Process{}
	if err := json.Unmarshal(r.Process, process); err != nil {
		return fmt.Errorf("read the process: %w", err)
	}
	if p.plan, err = newPlan(r.Target, process, r.Init); err != nil {
		return err
	}
	if len(process.Args) > 0 {
		p.command = process.Args[0]
	}
	if p.fds[planFile], err = unix.MemfdCreate("plan", unix.MFD_CLOEXEC); err != nil {
		return fmt.Errorf("write the plan: %w", err)
	}
	if p.fds[targetPidfd], err = pidfd.Open(r.Target); err != nil {
		return fmt.Errorf("open the container's process: %w", err)
	}
	if p.fds[cgroupDirectory], err = unix.Open(r.Cgroup, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return fmt.Errorf("open cgroup %s: %w", r.Cgroup, err)
	}
	var report [2]int
	if err := unix.Pipe2(report[:], unix.O_CLOEXEC); err != nil {
		return fmt.Errorf("make the report: %w", err)
	}
	p.report, p.fds[reportPipe] = report[0], report[1]
	return nil
}

// writePlan completes the plan with seccomp filters.
func (p *Prepared) writePlan(filters [][]unix.SockFilter) error {
	data := append(filterPlan(filters), p.plan...)
	// A write to a memfd either completes or fails with ENOSPC.
	n, err := unix.Write(p.fds[planFile], data)
	if err == nil && n != len(data) {
		err = io.ErrShortWrite
	}
	if err != nil {
		return fmt.Errorf("exec: write the plan: %w", err)
	}
	return nil
}

// Close closes what the process has not taken over.
func (p *Prepared) Close() {
	for i := range p.fds {
		closeFD(&p.fds[i])
	}
	closeFD(&p.report)
}

func closeFD(fd *int) {
	if *fd >= 0 {
		unix.Close(*fd)
		*fd = -1
	}
}

// Run starts the process on stdio and with seccomp filters, the first one first,
// once, by the helper at a path. It returns the process's pid in the guest's root
// PID namespace; it is a child of the caller, who waits for it. Of an init it
// returns the pid in the target's namespace.
//
// The process may wait for a file system of the container's that does not
// answer, in its working directory or at its command: it is killed at the end
// of ctx.
func (p *Prepared) Run(ctx context.Context, helper string, stdio [3]int, filters [][]unix.SockFilter) (int, error) {
	if err := p.writePlan(filters); err != nil {
		return 0, err
	}
	attr := &syscall.ProcAttr{Dir: "/", Env: []string{}, Sys: &syscall.SysProcAttr{}}
	if !p.init {
		// Born in its cgroup, as a move waits for a grace period of RCU.
		attr.Sys.UseCgroupFD, attr.Sys.CgroupFD = true, p.fds[cgroupDirectory]
	}
	for _, fd := range append(stdio[:], p.fds[:]...) {
		attr.Files = append(attr.Files, uintptr(fd))
	}
	mode := commandMode
	if p.init {
		mode = initMode
	}
	child, err := syscall.ForkExec(helper, []string{helperName, mode}, attr)
	if err != nil {
		return 0, fmt.Errorf("start %s: %w", helper, err)
	}
	// The helper and the process are the writers, and the report ends with them.
	closeFD(&p.fds[reportPipe])
	report, err := readReport(ctx, p.report)
	if err != nil {
		p.giveUp(child, report)
		return 0, fmt.Errorf("exec: read the report: %w", err)
	}
	reap(child)
	pid, err := p.parse(report)
	if pid != 0 && !p.init && !isChild(pid) {
		return 0, errclass.Join(err, fmt.Errorf("exec: the process %d in the report is not the agent's", pid))
	}
	if err != nil {
		if pid != 0 && !p.init {
			reap(pid)
		}
		return 0, err
	}
	return pid, nil
}

// isChild reports whether a process is the caller's child, or was until it exited:
// in a container with CAP_SYS_PTRACE others can have the new process write into
// the report.
func isChild(pid int) bool {
	err := unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
	return err == nil
}

// parse reads what became of the process: a line with its pid, and one with
// what failed. They come from two processes, in any order. A process that has
// failed is returned with the error: it is to be reaped, without which its PID
// namespace would not end.
func (p *Prepared) parse(report string) (int, error) {
	pid := 0
	var failed error
	for line := range strings.Lines(report) {
		kind, rest, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		value, step, _ := strings.Cut(rest, " ")
		n, err := strconv.Atoi(value)
		switch {
		case err != nil:
			failed = errclass.Join(failed, fmt.Errorf("exec: report %q: %w", line, err))
		case kind == "pid":
			pid = n
		default:
			failed = errclass.Join(failed, p.failure(step, syscall.Errno(n)))
		}
	}
	if failed == nil && pid == 0 {
		failed = errcode.ExecFailed.Wrap(errors.New("exec: the new process exited before it ran"))
	}
	return pid, failed
}

// failure words what failed. What is wrong with the command is the caller's.
func (p *Prepared) failure(step string, errno syscall.Errno) error {
	if step != "exec" {
		return errcode.ExecFailed.Errorf("exec: %s: %w", step, errno)
	}
	err := error(errno)
	switch errno {
	case unix.ENOENT:
		err = errors.New("executable file not found in the container")
	case unix.EACCES:
		err = errors.New("permission denied")
	}
	return errcode.ExecFailed.Errorf("exec %q: %w", p.command, err)
}

// giveUp kills the helper, and a process that has reported its pid and no more.
func (p *Prepared) giveUp(helper int, report string) {
	end := []int{helper}
	// An init ends with the placeholder.
	if pid, _ := p.parse(report); !p.init && pid > 0 && isChild(pid) {
		end = append(end, pid)
	}
	for _, pid := range end {
		_ = unix.Kill(pid, unix.SIGKILL)
		go reap(pid) // when the kernel lets it
	}
}

// reportPoll is how often the end of the context is looked for.
const reportPoll = 100 * time.Millisecond

// readReport reads what the helper and the process report. If ctx ends first, it
// returns what there is.
func readReport(ctx context.Context, fd int) (string, error) {
	var data []byte
	for b := make([]byte, 256); ; {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}} //nolint:gosec // a descriptor
		switch n, err := unix.Poll(fds, int(reportPoll.Milliseconds())); {
		case err != nil && !errors.Is(err, unix.EINTR):
			return string(data), err
		case n <= 0 && ctx.Err() != nil:
			return string(data), context.Cause(ctx)
		case n <= 0:
			continue
		}
		n, err := unix.Read(fd, b)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return string(data), err
		case n == 0:
			return string(data), nil
		default:
			data = append(data, b[:n]...)
		}
	}
}

// reap waits for a child that has ended or is about to.
func reap(pid int) {
	for {
		if _, err := unix.Wait4(pid, nil, 0, nil); !errors.Is(err, unix.EINTR) {
			return
		}
	}
}
