// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// process identifies a process by its pid and start time, because pids are
// reused.
type process struct {
	PID   int    `json:"pid,omitempty"`
	Start string `json:"start,omitempty"` // as /proc/PID/stat has it, in clock ticks since the machine's boot
}

func processOf(pid int) (process, error) {
	start, _, err := statOf(pid)
	return process{pid, start}, err
}

// statOf returns a process's start time and state.
func statOf(pid int) (start, state string, err error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", "", err
	}
	// The second field is the program's name in parentheses; it may contain
	// anything.
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	const stateField, startField = 0, 19 // the third and the twenty-second of all
	if len(fields) <= startField {
		return "", "", fmt.Errorf("/proc/%d/stat has %d fields", pid, len(fields))
	}
	return fields[startField], fields[stateField], nil
}

// alive reports whether the process still runs; a zombie does not.
func (p process) alive() bool {
	if p.PID == 0 {
		return false
	}
	start, state, err := statOf(p.PID)
	return err == nil && start == p.Start && state != "Z"
}

func (p process) signal(s syscall.Signal) {
	if p.alive() {
		_ = syscall.Kill(p.PID, s) // it may have exited meanwhile
	}
}

// hang is how long to wait for what takes a moment, on any machine, before it is
// taken for hung.
const hang = time.Minute

// waitGone waits for the processes to exit and reports whether they did.
func waitGone(ctx context.Context, limit time.Duration, processes ...process) bool {
	return eventually(ctx, limit, func() bool { return !slices.ContainsFunc(processes, process.alive) })
}

// eventually polls until the condition holds, for a bounded time, and returns
// the last result.
func eventually(ctx context.Context, limit time.Duration, is func() bool) bool {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !is() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return is()
		}
	}
	return true
}

// owned finds the testbed's processes, other than this one: they have its mark
// in their environment, or run one of its programs, or have one of its bundles
// as their working directory (Kata's shims sometimes clear environments).
func (t *Testbed) owned() ([]process, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var out []process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		p, err := processOf(pid)
		if err != nil || !p.alive() || !t.owns(pid) {
			continue
		}
		out = append(out, p)
	}
	return out, nil
}

// Pids finds the testbed's processes by their command lines.
func (t *Testbed) Pids(is func(args []string) bool) ([]int, error) {
	processes, err := t.owned()
	if err != nil {
		return nil, err
	}
	var out []int
	for _, p := range processes {
		cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p.PID))
		if args := strings.Split(strings.TrimSuffix(string(cmdline), "\x00"), "\x00"); err == nil && is(args) {
			out = append(out, p.PID)
		}
	}
	return out, nil
}

func (t *Testbed) owns(pid int) bool {
	dir := fmt.Sprintf("/proc/%d/", pid)
	if env, err := os.ReadFile(dir + "environ"); err == nil {
		if slices.Contains(strings.Split(string(env), "\x00"), ownerEnv+"="+t.Dir) {
			return true
		}
	}
	if cmdline, err := os.ReadFile(dir + "cmdline"); err == nil {
		name, _, _ := strings.Cut(string(cmdline), "\x00")
		if strings.HasPrefix(name, filepath.Join(t.Dir, "bin")+"/") {
			return true
		}
	}
	cwd, err := os.Readlink(dir + "cwd")
	return err == nil && strings.HasPrefix(cwd, filepath.Join(t.Dir, "run")+"/")
}

// listening lists the paths of the unix sockets that the processes listen on.
func listening(processes []process) map[string]bool {
	inodes := map[string]bool{}
	for _, p := range processes {
		links, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", p.PID))
		for _, link := range links {
			if target, err := os.Readlink(link); err == nil && strings.HasPrefix(target, "socket:[") {
				inodes[strings.Trim(target, "socket:[]")] = true
			}
		}
	}
	out := map[string]bool{}
	for _, s := range unixSockets() {
		if s.listens && inodes[s.inode] {
			out[s.path] = true
		}
	}
	return out
}

type unixSocket struct {
	path, inode string
	listens     bool
}

// unixSockets lists the machine's unix sockets with a path.
func unixSockets() []unixSocket {
	data, _ := os.ReadFile("/proc/net/unix")
	var out []unixSocket
	for line := range strings.Lines(string(data)) {
		// Num RefCount Protocol Flags Type St Inode Path
		fields := strings.Fields(line)
		if len(fields) == 8 && strings.HasPrefix(fields[7], "/") {
			const acceptsConnections = "00010000"
			out = append(out, unixSocket{path: fields[7], inode: fields[6], listens: fields[3] == acceptsConnections})
		}
	}
	return out
}

// endAll kills the testbed's processes until none is left: a shim may start one
// while it is being killed.
func (t *Testbed) endAll(ctx context.Context) error {
	for deadline := time.Now().Add(hang); ; {
		left, err := t.owned()
		if err != nil {
			return err
		}
		if len(left) == 0 {
			return nil
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			return fmt.Errorf("processes did not exit: %v", left)
		}
		for _, p := range left {
			p.signal(syscall.SIGKILL)
		}
		waitGone(ctx, time.Second, left...)
	}
}

// removeSocket removes a file if it is a socket.
func removeSocket(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil || info.Mode()&fs.ModeSocket == 0 {
		return err
	}
	return os.Remove(path)
}
