package enter

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Descriptors that go along with a request, in this order.
const (
	requestPlan   = iota // a file in memory
	requestStdio         // a socket that the stdio comes by
	requestReport        // the write end of a pipe
	requestTarget        // a pidfd
	requestCgroup        // a directory
	requestFiles
)

// A Spawner starts processes by a process of its own, which it starts when it
// is first needed, and again when it has ended.
type Spawner struct {
	// Command gives a command that runs [Serve] on its descriptor 3.
	Command func() (*exec.Cmd, error)

	mu   sync.Mutex
	conn *os.File
}

// Prepare starts the spawner's process, so that no request has to wait for it.
func (s *Spawner) Prepare() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn != nil {
		return nil
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("connect the spawner: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "spawner"), os.NewFile(uintptr(pair[1]), "spawner's")
	defer theirs.Close()
	cmd, err := s.Command()
	if err == nil {
		cmd.ExtraFiles = []*os.File{theirs}
		err = cmd.Start()
	}
	if err != nil {
		ours.Close()
		return fmt.Errorf("start the spawner: %w", err)
	}
	// It ends when it has read the end of the connection, or before its time.
	go func() { _ = cmd.Wait() }()
	s.conn = ours
	return nil
}

// Close lets the spawner's process end.
func (s *Spawner) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn != nil {
		s.conn.Close()
		s.conn = nil
	}
}

// Entered is a process that waits in a container's namespaces for its stdio,
// so that what takes time has been done when that is there. The container sees
// nothing of it yet.
type Entered struct {
	process []byte
	// stdio is the end of a socket pair, report that of a pipe.
	stdio, report int
}

// Enter makes a process that enters the container. What fails in the process
// itself is said by [Entered.Run]. The caller has to close it.
func (s *Spawner) Enter(r Request) (*Entered, error) {
	var files [requestFiles]int
	for i := range files {
		files[i] = -1
	}
	defer func() { closeAll(files[:]) }()
	e := &Entered{process: r.Process, stdio: -1, report: -1}
	err := e.open(r, &files)
	if err == nil {
		err = s.ask(unix.UnixRights(files[:]...))
	}
	if err != nil {
		closeAll([]int{e.stdio, e.report})
		return nil, fmt.Errorf("exec: %w", err)
	}
	return e, nil
}

func closeAll(fds []int) {
	for _, fd := range fds {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

// Run makes the process run on stdio and returns its pid in the guest's root
// pid namespace; it is a child of the caller, who waits for it. Of one that is
// to be the first of a pid namespace it returns the pid in the target's.
func (e *Entered) Run(stdio [3]int) (int, error) {
	// Where nobody receives them, the report says why.
	err := unix.Sendmsg(e.stdio, []byte{0}, unix.UnixRights(stdio[:]...), nil, unix.MSG_NOSIGNAL)
	if err != nil && !errors.Is(err, unix.EPIPE) && !errors.Is(err, unix.ECONNRESET) {
		return 0, fmt.Errorf("exec: pass stdio on: %w", err)
	}
	pid, err := e.conclude()
	if err != nil {
		return 0, named(err, e.process)
	}
	return pid, nil
}

// Close ends a process that has not run.
func (e *Entered) Close() {
	if e.report >= 0 {
		_, _ = e.conclude() // nothing has run
	}
}

// conclude waits for the end of the report.
func (e *Entered) conclude() (int, error) {
	unix.Close(e.stdio)
	defer func() {
		unix.Close(e.report)
		e.stdio, e.report = -1, -1
	}()
	return readReport(e.report)
}

// ask hands the request over.
func (s *Spawner) ask(rights []byte) error {
	for attempt := 0; ; attempt++ {
		err := s.Prepare()
		if err == nil {
			err = s.pass(rights)
		}
		if err == nil {
			return nil
		}
		s.Close()
		if attempt > 0 || !errors.Is(err, unix.EPIPE) && !errors.Is(err, unix.ECONNRESET) {
			return fmt.Errorf("ask the spawner: %w", err)
		}
	}
}

func (s *Spawner) pass(rights []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn == nil {
		return unix.EPIPE
	}
	return unix.Sendmsg(int(s.conn.Fd()), []byte{0}, rights, nil, unix.MSG_NOSIGNAL)
}

// open makes the files of a request, and the ends of them that are ours. They
// are plain descriptors: what a file of Go's needs besides, an emulated guest
// feels.
func (e *Entered) open(r Request, files *[requestFiles]int) error {
	process := &specs.Process{}
	if err := json.Unmarshal(r.Process, process); err != nil {
		return fmt.Errorf("read the process: %w", err)
	}
	data, err := newImage(r.Target, process, r.First)
	if err != nil {
		return err
	}
	if files[requestPlan], err = unix.MemfdCreate("plan", unix.MFD_CLOEXEC); err != nil {
		return fmt.Errorf("write the plan: %w", err)
	}
	// A file in memory takes all at once, or has no room.
	n, err := unix.Write(files[requestPlan], data)
	if err == nil && n != len(data) {
		err = io.ErrShortWrite
	}
	if err != nil {
		return fmt.Errorf("write the plan: %w", err)
	}
	if files[requestTarget], err = unix.PidfdOpen(r.Target, 0); err != nil {
		return fmt.Errorf("the container's process: %w", err)
	}
	if files[requestCgroup], err = unix.Open(r.Cgroup, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return &os.PathError{Op: "open", Path: r.Cgroup, Err: err}
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("connect the process: %w", err)
	}
	e.stdio, files[requestStdio] = pair[0], pair[1]
	var report [2]int
	if err := unix.Pipe2(report[:], unix.O_CLOEXEC); err != nil {
		return fmt.Errorf("make the report: %w", err)
	}
	e.report, files[requestReport] = report[0], report[1]
	return nil
}
