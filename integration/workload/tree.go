// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// tree is a process with children, threads and one of each kind of kernel
// object that processes hold. Every round uses all of them.
type tree struct {
	self   string // the program
	dir    string
	watch  string // a directory of its own
	n      int
	checks []treeCheck
}

// treeCheck uses one object in round n, and fails if it has changed.
type treeCheck struct {
	name  string
	check func(n int) error
}

func (t *tree) setup() error {
	var err error
	if t.self, err = os.Executable(); err != nil {
		return err
	}
	for _, part := range []struct {
		name string
		make func() (func(n int) error, error)
	}{
		{"child", t.child}, {"zombie", t.zombie}, {"thread with a signalfd", t.thread},
		{"deleted file", t.deletedFile}, {"file lock", t.fileLock},
		{"timerfd", timerfd}, {"POSIX timer", posixTimer}, {"interval timer", intervalTimer},
		{"eventfd and epoll", eventfdAndEpoll}, {"inotify", t.inotify},
	} {
		check, err := part.make()
		if err != nil {
			return fmt.Errorf("%s: %w", part.name, err)
		}
		t.checks = append(t.checks, treeCheck{part.name, check})
	}
	return nil
}

func (t *tree) round(w io.Writer) error {
	t.n++
	var errs []error
	for _, c := range t.checks {
		if err := c.check(t.n); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", c.name, err))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	_, err := fmt.Fprintf(w, "round %d of %d things\n", t.n, len(t.checks))
	return err
}

// child leads its own session and is queried in every round through a pipe, a
// socket pair and shared memory. The socket always has a message queued.
func (t *tree) child() (func(int) error, error) {
	memory, err := unix.MemfdCreate("shared", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	file := os.NewFile(uintptr(memory), "shared")
	if err := file.Truncate(int64(os.Getpagesize())); err != nil {
		return nil, err
	}
	shared, err := unix.Mmap(memory, 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	theirs := os.NewFile(uintptr(pair[1]), "socket")
	cmd := exec.Command(t.self, "tree-child")
	cmd.ExtraFiles = []*os.File{theirs, file}
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	if err := errors.Join(theirs.Close(), send(pair[0], 1)); err != nil {
		return nil, err
	}
	return func(n int) error {
		binary.LittleEndian.PutUint64(shared, uint64(n))
		if err := errors.Join(send(pair[0], n+1), binary.Write(in, binary.LittleEndian, uint64(n))); err != nil {
			return err
		}
		var answer treeAnswer
		if err := binary.Read(out, binary.LittleEndian, &answer); err != nil {
			return err
		}
		pid := uint64(cmd.Process.Pid)
		if want := (treeAnswer{uint64(n), uint64(n), uint64(n), pid, pid, uint64(os.Getpid())}); answer != want {
			return fmt.Errorf("it says %+v, not %+v", answer, want)
		}
		if have := binary.LittleEndian.Uint64(shared[8:]); have != uint64(2*n) {
			return fmt.Errorf("it wrote %d into the shared memory, not %d", have, 2*n)
		}
		return nil
	}, nil
}

func send(socket, n int) error {
	return unix.Send(socket, binary.LittleEndian.AppendUint64(nil, uint64(n)), unix.MSG_DONTWAIT)
}

// treeAnswer is what the child received on each path, and its ids.
type treeAnswer struct {
	Pipe, Socket, Memory uint64
	PID, Session, Parent uint64
}

// treeChild is the other end of [tree.child].
func treeChild() error {
	const socket, memory = 3, 4
	shared, err := unix.Mmap(memory, 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	for {
		var a treeAnswer
		if err := binary.Read(os.Stdin, binary.LittleEndian, &a.Pipe); err != nil {
			return err
		}
		message := make([]byte, 8)
		if _, err := unix.Read(socket, message); err != nil {
			return err
		}
		a.Socket, a.Memory = binary.LittleEndian.Uint64(message), binary.LittleEndian.Uint64(shared)
		binary.LittleEndian.PutUint64(shared[8:], 2*a.Memory)
		session, err := unix.Getsid(0)
		if err != nil {
			return err
		}
		a.PID, a.Session, a.Parent = uint64(os.Getpid()), uint64(session), uint64(os.Getppid())
		if err := binary.Write(os.Stdout, binary.LittleEndian, a); err != nil {
			return err
		}
	}
}

// zombie is a child that has exited and is not reaped.
func (t *tree) zombie() (func(int) error, error) {
	cmd := exec.Command(t.self, "no-such-program")
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	var info unix.Siginfo
	if err := unix.Waitid(unix.P_PID, cmd.Process.Pid, &info, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		return nil, err
	}
	stat := func() (string, error) {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", cmd.Process.Pid))
		if err != nil {
			return "", err
		}
		var info unix.Siginfo
		if err := unix.Waitid(unix.P_PID, cmd.Process.Pid, &info, unix.WEXITED|unix.WNOWAIT|unix.WNOHANG, nil); err != nil {
			return "", err
		}
		// si_pid, si_uid and si_status of sigaction(2), on 64-bit machines.
		result := (*[unsafe.Sizeof(info)]byte)(unsafe.Pointer(&info))[16:28]
		// The state, the parent, the group and the session.
		return fmt.Sprintf("%s with result %x", strings.Join(strings.Fields(string(data))[2:6], " "), result), nil
	}
	want, err := stat()
	if err != nil {
		return nil, err
	}
	if !strings.HasPrefix(want, "Z "+strconv.Itoa(os.Getpid())) {
		return nil, fmt.Errorf("it is %q", want)
	}
	return func(int) error {
		have, err := stat()
		if err == nil && have != want {
			err = fmt.Errorf("it is %q, not %q", have, want)
		}
		return err
	}, nil
}
