// SPDX-License-Identifier: Apache-2.0

// Package cgroup finds, freezes and kills the cgroups of containers in the
// guest, which has cgroup v2 (by Kata's kernel parameters,
// src/runtime/arch/amd64-options.mk). Only the guest agent uses it.
//
// containerd/cgroups is not used: its Freeze returns once cgroup.freeze reads
// 1, which only means that freezing has been requested.
//
// The package relies on Kata 4.1.0 and Linux 6.18.
package cgroup

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
)

// Root is where cgroup v2 is mounted in the guest.
const Root = "/sys/fs/cgroup"

// Find returns the directory of a container's cgroup from the cgroupsPath of
// its OCI spec, by the rules of the kata-agent (src/agent/src/rpc.rs and
// rustjail/src/container.rs): slice:prefix:name for systemd, or a path.
func Find(root, cgroupsPath, id string) (string, error) {
	for _, c := range candidates(cgroupsPath, id) {
		dir := filepath.Join(root, c)
		if _, err := os.Stat(filepath.Join(dir, "cgroup.procs")); err == nil {
			return dir, nil
		}
	}
	return "", fmt.Errorf("find the cgroup of container %s (cgroupsPath %q): %w", id, cgroupsPath, fs.ErrNotExist)
}

func candidates(path, id string) []string {
	if path == "" {
		return []string{id}
	}
	if parts := strings.Split(path, ":"); len(parts) == 3 {
		return []string{
			filepath.Join(expandSlice(parts[0]), parts[1]+"-"+parts[2]+".scope"),
			filepath.Join(parts...),
		}
	}
	return []string{path}
}

// expandSlice turns a-b.slice into a.slice/a-b.slice, as systemd does.
func expandSlice(slice string) string {
	name, ok := strings.CutSuffix(slice, ".slice")
	if !ok || name == "-" || name == "" {
		return strings.TrimSuffix(slice, "-.slice")
	}
	var path, prefix string
	for part := range strings.SplitSeq(name, "-") {
		prefix += part
		path = filepath.Join(path, prefix+".slice")
		prefix += "-"
	}
	return path
}

// Procs lists the processes of a cgroup and, if deep, of those below it.
func Procs(dir string, deep bool) ([]int, error) {
	var pids []int
	read := func(d string) error {
		data, err := os.ReadFile(filepath.Join(d, "cgroup.procs"))
		if err != nil {
			return err
		}
		for f := range strings.FieldsSeq(string(data)) {
			pid, err := strconv.Atoi(f)
			if err != nil {
				return fmt.Errorf("cgroup.procs of %s: %w", d, err)
			}
			pids = append(pids, pid)
		}
		return nil
	}
	if !deep {
		return pids, read(dir)
	}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) && path != dir {
			return nil // removed meanwhile
		}
		if err != nil || !e.IsDir() {
			return err
		}
		err = read(path)
		if errors.Is(err, fs.ErrNotExist) && path != dir {
			return nil
		}
		return err
	})
	return pids, err
}

// Own returns the directory of this process's cgroup.
func Own() (string, error) {
	data, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(data)) {
		// That of version 2 has the number 0 and no controllers.
		if path, ok := strings.CutPrefix(line, "0::"); ok {
			return filepath.Join(Root, strings.TrimSuffix(path, "\n")), nil
		}
	}
	return "", errors.New("/proc/self/cgroup names no cgroup of version 2")
}

// Move moves a process to a cgroup.
func Move(pid int, dir string) error {
	if err := write(dir, "cgroup.procs", strconv.Itoa(pid)); err != nil {
		return fmt.Errorf("move process %d to the cgroup %s: %w", pid, dir, err)
	}
	return nil
}

// Frozen reports whether freezing has been requested for a cgroup.
func Frozen(dir string) (bool, error) {
	data, err := os.ReadFile(filepath.Join(dir, "cgroup.freeze"))
	if err != nil {
		return false, err
	}
	return strings.TrimSpace(string(data)) == "1", nil
}

// Freeze freezes all processes of a cgroup and returns once they are frozen. If
// ctx ends first, the cgroup is thawed again.
func Freeze(ctx context.Context, dir string) error {
	if err := Hold(ctx, dir); err != nil {
		return errclass.Join(err, Thaw(dir))
	}
	return nil
}

// Hold is Freeze for processes that must not run: whatever its error, the cgroup
// is not thawed.
func Hold(ctx context.Context, dir string) error {
	events, err := os.Open(filepath.Join(dir, "cgroup.events"))
	if err != nil {
		return fmt.Errorf("freeze: %w", err)
	}
	defer events.Close()
	if err := write(dir, "cgroup.freeze", "1"); err != nil {
		return fmt.Errorf("freeze: %w", err)
	}
	for {
		frozen, populated, err := readEvents(events)
		if err != nil {
			return fmt.Errorf("freeze: %w", err)
		}
		if frozen {
			return nil
		}
		if !populated {
			return fmt.Errorf("freeze: no processes are left: %w", fs.ErrNotExist)
		}
		if err := ctx.Err(); err != nil {
			return errcode.FreezeTimeout.Errorf("freeze: processes were not frozen in time: %w", err)
		}
		if err := await(events); err != nil {
			return fmt.Errorf("freeze: %w", err)
		}
	}
}

// Thaw resumes the processes of a cgroup. A cgroup that is gone is no error.
func Thaw(dir string) error {
	err := write(dir, "cgroup.freeze", "0")
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("thaw: %w", err)
	}
	return nil
}

// Kill kills every process of a cgroup and of those below it, and waits until
// they have exited or ctx ends.
func Kill(ctx context.Context, dir string) error {
	events, err := os.Open(filepath.Join(dir, "cgroup.events"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("kill cgroup: %w", err)
	}
	defer events.Close()
	if err := write(dir, "cgroup.kill", "1"); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return fmt.Errorf("kill cgroup: %w", err)
	}
	for {
		_, populated, err := readEvents(events)
		if errors.Is(err, unix.ENODEV) || !populated && err == nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("kill cgroup: %w", err)
		}
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("kill cgroup %s: processes are left: %w", dir, err)
		}
		if err := await(events); err != nil {
			return fmt.Errorf("kill cgroup: %w", err)
		}
	}
}

// await waits a moment for a change of cgroup.events, which is reported as
// POLLPRI.
func await(events *os.File) error {
	fds := []unix.PollFd{{Fd: int32(events.Fd()), Events: unix.POLLPRI}} //nolint:gosec // a descriptor
	if _, err := unix.Poll(fds, 50); err != nil && !errors.Is(err, unix.EINTR) {
		return err
	}
	return nil
}

// Remove kills every process of a cgroup, as Kill does, and removes it and
// those below it. A cgroup that is gone is no error.
func Remove(ctx context.Context, dir string) error {
	if err := Kill(ctx, dir); err != nil {
		return err
	}
	var dirs []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	})
	for _, d := range slices.Backward(dirs) {
		if rerr := os.Remove(d); !errors.Is(rerr, fs.ErrNotExist) {
			err = errclass.Join(err, rerr)
		}
	}
	if err != nil {
		return fmt.Errorf("remove cgroup: %w", err)
	}
	return nil
}

func readEvents(f *os.File) (frozen, populated bool, err error) {
	if _, err := f.Seek(0, 0); err != nil {
		return false, false, err
	}
	s := bufio.NewScanner(f)
	for s.Scan() {
		switch s.Text() {
		case "frozen 1":
			frozen = true
		case "populated 1":
			populated = true
		}
	}
	return frozen, populated, s.Err()
}

// OOMKills returns how many processes of a cgroup and of those below it were killed
// because they needed more memory than its limit, 0 where that is not known.
func OOMKills(dir string) (n int) {
	data, err := os.ReadFile(filepath.Join(dir, "memory.events"))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(data)) {
		if value, ok := strings.CutPrefix(line, "oom_kill "); ok {
			n, _ = strconv.Atoi(strings.TrimSpace(value))
		}
	}
	return n
}

// write does not create: a missing file means that the cgroup is gone.
func write(dir, file, value string) error {
	f, err := os.OpenFile(filepath.Join(dir, file), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errclass.Join(err, f.Close())
}
