// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// ExecMode is the agent's helper mode that executes a process in a container.
// It is a separate process because it joins what it cannot leave: the
// container's cgroup, in which it freezes while that is frozen.
const ExecMode = "exec"

// The helper's descriptors after the process's stdio. The namespaces follow.
const (
	execRequestFd = 3 + iota
	execResultFd
	execNamespacesFd
)

// firstLeak is the first of two copies of its terminal that Kata's agent leaks
// to an exec.
const firstLeak = 31

// execNamespaces are the namespaces to join, in this order: the mount namespace
// last, because /proc is needed until then.
var execNamespaces = []struct {
	name string
	flag int
}{
	{"ipc", unix.CLONE_NEWIPC}, {"uts", unix.CLONE_NEWUTS}, {"pid", unix.CLONE_NEWPID}, {"mnt", unix.CLONE_NEWNS},
}

type execRequest struct {
	Cgroup  string         `json:"cgroup"`
	Process *specs.Process `json:"process"`
	// Terminal: stdin is a terminal, and copies of it leak.
	Terminal bool `json:"terminal"`
	// Filtered is a process whose seccomp filter the new one is to have, 0 for none.
	Filtered int `json:"filtered"`
}

type execResult struct {
	Pid   int    `json:"pid,omitempty"`
	Error string `json:"error,omitempty"`
}

// Exec is the helper: it returns the new process's pid and exits, so that the
// agent inherits the process.
func Exec() {
	runtime.LockOSThread()
	result := os.NewFile(execResultFd, "result")
	pid, err := execute()
	answer := execResult{Pid: pid}
	if err != nil {
		answer.Error = err.Error()
	}
	if err := json.NewEncoder(result).Encode(answer); err != nil {
		os.Exit(1)
	}
}

func execute() (int, error) {
	var r execRequest
	if err := json.NewDecoder(os.NewFile(execRequestFd, "request")).Decode(&r); err != nil {
		return 0, fmt.Errorf("read the request: %w", err)
	}
	var filter []unix.SockFilter
	if r.Filtered != 0 {
		var err error
		if filter, err = firstFilter(r.Filtered); err != nil {
			return 0, fmt.Errorf("read the seccomp filter of process %d: %w", r.Filtered, err)
		}
	}
	procs := cgroup(r.Cgroup).file("cgroup.procs")
	if err := os.WriteFile(procs, []byte("0"), 0); err != nil {
		return 0, fmt.Errorf("join the cgroup: %w", err)
	}
	p := r.Process
	if err := setLimits(p.Rlimits); err != nil {
		return 0, err
	}
	// A thread that shares its fs_struct cannot join a mount namespace.
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWCGROUP); err != nil {
		return 0, fmt.Errorf("unshare: %w", err)
	}
	for i, ns := range execNamespaces {
		if err := unix.Setns(execNamespacesFd+i, ns.flag); err != nil {
			return 0, fmt.Errorf("join the %s namespace: %w", ns.name, err)
		}
		unix.CloseOnExec(execNamespacesFd + i)
	}
	unix.CloseOnExec(execRequestFd)
	unix.CloseOnExec(execResultFd)
	if err := unix.Chdir(p.Cwd); err != nil {
		return 0, fmt.Errorf("working directory %s: %w", p.Cwd, err)
	}
	path, err := lookUp(p.Args, p.Env)
	if err != nil {
		return 0, err
	}
	files := []uintptr{0, 1, 2}
	if r.Terminal {
		for len(files) < firstLeak {
			files = append(files, ^uintptr(0)) // not open
		}
		files = append(files, 0, 0)
	}
	if filter != nil { // while it has the capability to set one
		if err := setFilter(filter); err != nil {
			return 0, err
		}
	}
	if err := become(p); err != nil {
		return 0, err
	}
	pid, err := syscall.ForkExec(path, p.Args, &syscall.ProcAttr{
		Env:   p.Env,
		Files: files,
		Sys:   &syscall.SysProcAttr{Setsid: true, Setctty: r.Terminal},
	})
	if err != nil {
		return 0, fmt.Errorf("execute %s: %w", path, err)
	}
	return pid, nil
}

func setLimits(limits []specs.POSIXRlimit) error {
	numbers := map[string]int{
		"RLIMIT_AS": unix.RLIMIT_AS, "RLIMIT_CORE": unix.RLIMIT_CORE, "RLIMIT_CPU": unix.RLIMIT_CPU, "RLIMIT_DATA": unix.RLIMIT_DATA,
		"RLIMIT_FSIZE": unix.RLIMIT_FSIZE, "RLIMIT_LOCKS": unix.RLIMIT_LOCKS, "RLIMIT_MEMLOCK": unix.RLIMIT_MEMLOCK,
		"RLIMIT_MSGQUEUE": unix.RLIMIT_MSGQUEUE, "RLIMIT_NICE": unix.RLIMIT_NICE, "RLIMIT_NOFILE": unix.RLIMIT_NOFILE,
		"RLIMIT_NPROC": unix.RLIMIT_NPROC, "RLIMIT_RSS": unix.RLIMIT_RSS, "RLIMIT_RTPRIO": unix.RLIMIT_RTPRIO,
		"RLIMIT_RTTIME": unix.RLIMIT_RTTIME, "RLIMIT_SIGPENDING": unix.RLIMIT_SIGPENDING, "RLIMIT_STACK": unix.RLIMIT_STACK,
	}
	for _, l := range limits {
		number, ok := numbers[l.Type]
		if !ok {
			return fmt.Errorf("unknown limit %q", l.Type)
		}
		// With package syscall, which then does not restore RLIMIT_NOFILE at
		// exec.
		if err := syscall.Setrlimit(number, &syscall.Rlimit{Cur: l.Soft, Max: l.Hard}); err != nil {
			return fmt.Errorf("set %s: %w", l.Type, err)
		}
	}
	return nil
}

// lookUp finds the program in the container by the process's PATH.
func lookUp(args, env []string) (string, error) {
	if len(args) == 0 {
		return "", errors.New("no program")
	}
	if strings.Contains(args[0], "/") {
		return args[0], nil
	}
	path := "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	for _, variable := range env {
		if value, ok := strings.CutPrefix(variable, "PATH="); ok {
			path = value
		}
	}
	for _, dir := range filepath.SplitList(path) {
		candidate := filepath.Join(dir, args[0])
		if info, err := os.Stat(candidate); err == nil && info.Mode().IsRegular() && info.Mode().Perm()&0o111 != 0 {
			return candidate, nil
		}
	}
	return "", fmt.Errorf("%s: not found in %s", args[0], path)
}

// become changes this thread, and so what it forks, to the process's user and
// capabilities. The calls are raw: Go's would change all threads, some of which
// are not in the container.
func become(p *specs.Process) error {
	caps, err := parseCapabilities(p.Capabilities)
	if err != nil {
		return err
	}
	for c := 0; c <= unix.CAP_LAST_CAP; c++ {
		if caps.bounding&(1<<c) == 0 {
			// A capability unknown to the kernel need not be dropped.
			if err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0); err != nil && err != unix.EINVAL {
				return fmt.Errorf("drop capability %d: %w", c, err)
			}
		}
	}
	if err := unix.Prctl(unix.PR_SET_KEEPCAPS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("keep the capabilities: %w", err)
	}
	for _, step := range []func() error{
		func() error { return rawSetgroups(p.User.AdditionalGids) },
		func() error { return raw(unix.SYS_SETRESGID, p.User.GID) },
		func() error { return raw(unix.SYS_SETRESUID, p.User.UID) },
	} {
		if err := step(); err != nil {
			return fmt.Errorf("change the user: %w", err)
		}
	}
	if p.NoNewPrivileges {
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			return fmt.Errorf("forbid new privileges: %w", err)
		}
	}
	return caps.set()
}
