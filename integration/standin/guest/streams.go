// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// streams are the agent's ends of a process's stdio, created in the guest's
// root: three pipes, or a terminal of the agent's devpts. A container's stdio
// is never a socket nor a terminal of its own devpts.
type streams struct {
	stdin          *os.File
	stdout, stderr *os.File
	terminal       *os.File // the master, which then is also stdin and stdout
}

// theirs are the process's ends.
type theirs struct {
	stdio [3]*os.File
	// leaked are copies of the terminal that the process inherits in addition
	// to its stdio: Kata's agent leaks some, and a checkpoint has to cope with
	// them.
	leaked []*os.File
}

func (t *theirs) close() {
	for _, f := range append(t.stdio[:], t.leaked...) {
		if f != nil {
			f.Close()
		}
	}
}

func newStreams(terminal bool, leaks int) (*streams, *theirs, error) {
	if terminal {
		return newTerminal(leaks)
	}
	s, t := &streams{}, &theirs{}
	for i, ours := range []**os.File{&s.stdin, &s.stdout, &s.stderr} {
		var fds [2]int
		if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
			s.close()
			t.close()
			return nil, nil, fmt.Errorf("make the stdio pipes: %w", err)
		}
		mine, other := fds[0], fds[1]
		if i == 0 {
			mine, other = fds[1], fds[0]
		}
		// Only the agent's end is non-blocking; the other one is the
		// workload's.
		_ = unix.SetNonblock(mine, true)
		*ours = os.NewFile(uintptr(mine), "pipe")
		t.stdio[i] = os.NewFile(uintptr(other), "pipe")
	}
	return s, t, nil
}

func newTerminal(leaks int) (*streams, *theirs, error) {
	fd, err := unix.Open("/dev/pts/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("open a terminal: %w", err)
	}
	master := os.NewFile(uintptr(fd), "ptmx")
	s, t := &streams{stdin: master, stdout: master, terminal: master}, &theirs{}
	number, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	}
	if err != nil {
		master.Close()
		return nil, nil, fmt.Errorf("open a terminal: %w", err)
	}
	for i := range len(t.stdio) + leaks {
		slave, err := unix.Open("/dev/pts/"+strconv.Itoa(number), unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
		if err != nil {
			master.Close()
			t.close()
			return nil, nil, fmt.Errorf("open a terminal: %w", err)
		}
		f := os.NewFile(uintptr(slave), "pts")
		if i < len(t.stdio) {
			t.stdio[i] = f
		} else {
			t.leaked = append(t.leaked, f)
		}
	}
	return s, t, nil
}

func (s *streams) close() {
	for _, f := range []*os.File{s.stdin, s.stdout, s.stderr} {
		if f != nil {
			f.Close()
		}
	}
}

// resize sets a terminal's size.
func (s *streams) resize(width, height uint32) error {
	if s.terminal == nil {
		return errors.New("no terminal")
	}
	// Not with Fd, which may make it blocking.
	raw, err := s.terminal.SyscallConn()
	if err != nil {
		return err
	}
	size := &unix.Winsize{Row: uint16(height), Col: uint16(width)}
	if cerr := raw.Control(func(fd uintptr) { err = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, size) }); cerr != nil {
		return cerr
	}
	return err
}

// drainLimit is how long a terminal's output is still read after its process
// has exited: others may hold it open forever.
const drainLimit = 200 * time.Millisecond

func (s *streams) drain() {
	if s.terminal != nil {
		_ = s.terminal.SetReadDeadline(time.Now().Add(drainLimit))
	}
}

// ended reports whether a read error means the end of the output: terminals
// report theirs with errors of their own.
func ended(err error) bool {
	return errors.Is(err, unix.EIO) || errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, os.ErrClosed)
}
