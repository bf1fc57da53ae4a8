// Package enter starts a process inside the namespaces of another one, the
// time namespace among them, which only a process with a single thread can
// join. Go's processes have many: so it forks without an execve, and the child
// does the rest by raw system calls on what was laid out before.
//
// A fork copies the page tables of the process that forks, and makes it copy
// each page that it writes to next. So the fork is the work of a process of its
// own with little memory, which the guest agent starts and talks to by a
// [Spawner], and which runs [Serve]. Both are root in the guest's root
// namespaces.
package enter

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

// Request says what to start and where.
type Request struct {
	// Target is the process whose namespaces are joined.
	Target int `json:"target"`
	// Cgroup is the directory of the cgroup, of version 2, that the process starts in.
	Cgroup string `json:"cgroup"`
	// Process is what the caller asked for, an OCI process: arguments,
	// environment, user, capabilities, limits, terminal. Without an OOM score of
	// its own it gets the target's.
	Process json.RawMessage `json:"process"`
	// First has the process be the first of a new pid namespace, which is a child
	// of the target's. It belongs to nobody then: the guest's reaper takes it.
	First bool `json:"first"`
}

// readReport reads what became of a request until all who could write have
// ended or become the process: its pid, or what went wrong.
func readReport(report int) (int, error) {
	var data []byte
	for b := make([]byte, 8*recordSize); ; {
		n, err := unix.Read(report, b)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("report of the new process: %w", err)
		}
		if n == 0 {
			break
		}
		data = append(data, b[:n]...)
	}
	pid := 0
	var err error
	for len(data) >= recordSize && err == nil {
		kind, value := binary.NativeEndian.Uint32(data), binary.NativeEndian.Uint32(data[4:])
		data = data[recordSize:]
		switch kind {
		case recordFirst:
			reap(int(value))
		case recordPID:
			pid = int(value)
		default:
			err = &stepError{kind, syscall.Errno(value)}
		}
	}
	if err == nil && pid == 0 {
		err = errors.New("the new process ended before it ran")
	}
	if err != nil && pid != 0 {
		reap(pid)
	}
	return pid, err
}

// reap waits for a child that has ended or is about to.
func reap(pid int) {
	for {
		if _, err := unix.Wait4(pid, nil, 0, nil); !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

// stepError is the failure of one of the children's steps.
type stepError struct {
	step  uint32
	errno syscall.Errno
}

// Error implements error.
func (e *stepError) Error() string {
	if e.step == stepExec {
		switch e.errno {
		case unix.ENOENT:
			return "executable file not found in the container"
		case unix.EACCES:
			return "permission denied"
		}
		return e.errno.Error()
	}
	return fmt.Sprintf("%s: %v", stepNames[e.step], e.errno)
}

// named says which command could not be executed.
func named(err error, process []byte) error {
	var failed *stepError
	var command struct{ Args []string }
	if !errors.As(err, &failed) || failed.step != stepExec || json.Unmarshal(process, &command) != nil || len(command.Args) == 0 {
		return err
	}
	return fmt.Errorf("exec %q: %w", command.Args[0], err)
}
