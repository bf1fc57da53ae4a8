package enter

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Descriptors that go along with a request, in this order.
const (
	requestPlan = iota // a file in memory
	requestStdio
	requestReport = requestStdio + iota + 1
	requestTarget
	requestCgroup
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

// Start starts a process on stdio and returns its pid in the guest's root pid
// namespace; it is a child of the caller, who waits for it.
func (s *Spawner) Start(r Request, stdio [3]*os.File) (int, error) {
	report, err := s.send(r, stdio)
	if err != nil {
		return 0, err
	}
	defer report.Close()
	pid, err := readReport(report)
	if err != nil {
		return 0, named(err, r.Process)
	}
	return pid, nil
}

// send hands the request over and returns where it is reported on.
func (s *Spawner) send(r Request, stdio [3]*os.File) (_ *os.File, err error) {
	files, err := open(r)
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	if err != nil {
		return nil, fmt.Errorf("exec: %w", err)
	}
	read, write, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer write.Close()
	var fds []int
	for _, f := range []*os.File{files[0], stdio[0], stdio[1], stdio[2], write, files[1], files[2]} {
		fds = append(fds, int(f.Fd()))
	}
	rights := unix.UnixRights(fds...)
	for attempt := 0; ; attempt++ {
		if err = s.Prepare(); err == nil {
			err = s.pass(rights)
		}
		if err == nil {
			return read, nil
		}
		s.Close()
		if attempt > 0 || !errors.Is(err, unix.EPIPE) && !errors.Is(err, unix.ECONNRESET) {
			read.Close()
			return nil, fmt.Errorf("ask the spawner: %w", err)
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

// open makes the request's files: the plan, the target and its cgroup.
func open(r Request) ([]*os.File, error) {
	process := &specs.Process{}
	if err := json.Unmarshal(r.Process, process); err != nil {
		return nil, fmt.Errorf("read the process: %w", err)
	}
	data, err := newImage(r.Target, process)
	if err != nil {
		return nil, err
	}
	var files []*os.File
	fd, err := unix.MemfdCreate("plan", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("write the plan: %w", err)
	}
	files = append(files, os.NewFile(uintptr(fd), "plan"))
	if _, err := files[0].Write(data); err != nil {
		return files, fmt.Errorf("write the plan: %w", err)
	}
	if fd, err = unix.PidfdOpen(r.Target, 0); err != nil {
		return files, fmt.Errorf("the container's process: %w", err)
	}
	files = append(files, os.NewFile(uintptr(fd), "target"))
	procs, err := os.OpenFile(filepath.Join(r.Cgroup, "cgroup.procs"), os.O_WRONLY, 0)
	if err != nil {
		return files, err
	}
	return append(files, procs), nil
}
