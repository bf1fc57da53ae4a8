// Package enter starts a process inside the namespaces of another one, the
// time namespace among them, which only a process with a single thread can
// join. Go's processes have many: so [Start] forks without an execve, and the
// child does the rest by raw system calls on what was laid out before.
//
// Only the guest agent calls it, as root in the guest's root namespaces.
package enter

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strconv"
	"strings"
	"syscall"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Request says what to start and where.
type Request struct {
	// Target is the process whose namespaces are joined.
	Target int
	// Cgroup is the directory of the cgroup that the process starts in.
	Cgroup string
	// Stdio are the descriptors 0 to 2 of the process.
	Stdio [3]*os.File
	// OOMScoreAdj of the process.
	OOMScoreAdj int
	// Process is what the caller asked for: arguments, environment, user,
	// capabilities, limits, terminal.
	Process *specs.Process
}

// Start forks the process and returns its pid in the guest's root pid
// namespace; it is a child of the caller, who waits for it.
func Start(r Request) (int, error) {
	p, err := newPlan(r)
	if err != nil {
		return 0, err
	}
	defer p.close()
	report, err := p.fork()
	if err != nil {
		return 0, fmt.Errorf("fork: %w", err)
	}
	return readReport(report, r.Process.Args[0])
}

// readReport reads what the children said: the pid, or what went wrong.
func readReport(report *os.File, name string) (int, error) {
	defer report.Close()
	data, err := io.ReadAll(report)
	if err != nil {
		return 0, fmt.Errorf("report of the new process: %w", err)
	}
	pid := 0
	for ; len(data) >= recordSize; data = data[recordSize:] {
		kind, value := binary.NativeEndian.Uint32(data), binary.NativeEndian.Uint32(data[4:])
		if kind == recordPID {
			pid = int(value)
			continue
		}
		err = errors.Join(err, stepError(kind, syscall.Errno(value), name))
	}
	if err != nil {
		if pid != 0 {
			_, _ = unix.Wait4(pid, nil, 0, nil) // it has failed; the error is known
		}
		return 0, err
	}
	if pid == 0 {
		return 0, errors.New("the new process ended before it ran")
	}
	return pid, nil
}

func stepError(step uint32, errno syscall.Errno, name string) error {
	if step == stepExec {
		switch errno {
		case unix.ENOENT:
			return fmt.Errorf("exec %q: executable file not found in the container", name)
		case unix.EACCES:
			return fmt.Errorf("exec %q: permission denied", name)
		}
		return fmt.Errorf("exec %q: %w", name, errno)
	}
	return fmt.Errorf("%s: %w", stepNames[step], errno)
}

// candidates are the paths to try for a command, as execvp(3) would.
func candidates(name string, env []string) []string {
	if strings.Contains(name, "/") {
		return []string{name}
	}
	search := "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	for _, e := range env {
		if v, ok := strings.CutPrefix(e, "PATH="); ok {
			search = v
		}
	}
	var out []string
	for _, dir := range strings.Split(search, ":") {
		if dir == "" {
			dir = "."
		}
		out = append(out, dir+"/"+name)
	}
	return out
}

// environment adds HOME where the caller set none, as Kata's agent does, from
// the passwd file of the container, which is looked up without leaving it.
func environment(r Request) []string {
	for _, e := range r.Process.Env {
		if strings.HasPrefix(e, "HOME=") {
			return r.Process.Env
		}
	}
	return append(append([]string(nil), r.Process.Env...), "HOME="+home(r.Target, r.Process.User.UID))
}

func home(target int, uid uint32) string {
	root, err := os.OpenRoot(fmt.Sprintf("/proc/%d/root", target))
	if err != nil {
		return "/"
	}
	defer root.Close()
	f, err := root.Open("etc/passwd")
	if err != nil {
		return "/"
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, 1<<20))
	if err != nil {
		return "/"
	}
	for line := range bytes.Lines(data) {
		fields := strings.Split(strings.TrimSpace(string(line)), ":")
		if len(fields) >= 6 && fields[2] == strconv.FormatUint(uint64(uid), 10) && path.IsAbs(fields[5]) {
			return fields[5]
		}
	}
	return "/"
}
