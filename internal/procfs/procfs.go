// SPDX-License-Identifier: Apache-2.0

// Package procfs reads what the kernel reports about processes below /proc:
// the few fields of stat and status that tell one process from another, its
// command line and its namespaces. The shim and the guest agent both use it, so
// that each format is parsed once. It reads the /proc of the caller's mount
// namespace; pids are those of that mount's PID namespace.
//
// Written against Linux 6.18 (proc_pid_stat(5), proc_pid_status(5)); every
// field read here has been there since Linux 4.1.
package procfs

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
)

// Stat is a part of /proc/PID/stat.
type Stat struct {
	// Name is the command's, as the process has it. It may contain any character.
	Name string
	// State is the process's state, such as 'R' or 'Z'.
	State byte
	// Parent is the pid of its parent; 0: it is outside of the PID namespace.
	Parent int
	// Session is the pid of its session's leader; 0: it is outside of the PID
	// namespace.
	Session int
	// Terminal is the device number of its controlling terminal, as in st_rdev;
	// 0: it has none.
	Terminal uint64
	// StartTime is in clock ticks after boot. With it a pid names one process
	// and no later one.
	StartTime uint64
}

// ReadStat reads the stat file of a process. Its error wraps
// [fs.ErrNotExist] where there is no such process.
func ReadStat(pid int) (Stat, error) {
	data, err := read(pid, "stat")
	if err != nil {
		return Stat{}, err
	}
	s, err := parseStat(data)
	if err != nil {
		return Stat{}, fmt.Errorf("parse /proc/%d/stat: %w", pid, err)
	}
	return s, nil
}

func parseStat(data []byte) (Stat, error) {
	// The second field, the command's name, is in parentheses and may contain
	// any character.
	first, i := bytes.IndexByte(data, '('), bytes.LastIndexByte(data, ')')
	if first < 0 || i < first {
		return Stat{}, errors.New("no command")
	}
	// By their numbers in proc(5), which start from 1, less the first two fields.
	const parent, session, terminal, startTime = 4 - 3, 6 - 3, 7 - 3, 22 - 3
	var fields [startTime + 1]string
	n := 0
	for field := range bytes.FieldsSeq(data[i+1:]) {
		if fields[n], n = string(field), n+1; n == len(fields) {
			break
		}
	}
	if n < len(fields) {
		return Stat{}, fmt.Errorf("%d fields after the command", n)
	}
	s := Stat{Name: string(data[first+1 : i]), State: fields[0][0]}
	var errs [4]error
	s.Parent, errs[0] = strconv.Atoi(fields[parent])
	s.Session, errs[3] = strconv.Atoi(fields[session])
	// The kernel prints these 32 bits with a sign.
	device, err := strconv.ParseInt(fields[terminal], 10, 32)
	s.Terminal, errs[1] = uint64(uint32(device)), err //nolint:gosec // see above
	s.StartTime, errs[2] = strconv.ParseUint(fields[startTime], 10, 64)
	return s, errclass.Join(errs[:]...)
}

// Exited reports whether the process has exited and only waits to be reaped.
func (s Stat) Exited() bool { return s.State == 'Z' || s.State == 'X' }

// StartTime returns when a process started, in clock ticks after boot.
func StartTime(pid int) (uint64, error) {
	s, err := ReadStat(pid)
	return s.StartTime, err
}

// userHZ is the number of clock ticks in a second as the kernel reports them to
// programs, on each architecture that Kata runs on.
const userHZ = 100

// Parent returns the pid of a process's parent, from the procfs that is mounted at
// root.
func Parent(root string, pid int) (int, error) {
	s, err := readStatAt(root, pid)
	return s.Parent, err
}

func readStatAt(root string, pid int) (Stat, error) {
	data, err := os.ReadFile(filepath.Join(root, strconv.Itoa(pid), "stat"))
	if err != nil {
		return Stat{}, err
	}
	s, err := parseStat(data)
	if err != nil {
		return Stat{}, fmt.Errorf("parse the stat of process %d: %w", pid, err)
	}
	return s, nil
}

// Started returns when a process started, by the clock of the host, from the
// procfs that is mounted at root. The kernel knows when it booted to the second.
// The modification time of /proc/PID is no answer: it is that of the first look
// at it.
func Started(root string, pid int) (time.Time, error) {
	s, err := readStatAt(root, pid)
	if err != nil {
		return time.Time{}, err
	}
	data, err := os.ReadFile(filepath.Join(root, "stat"))
	if err != nil {
		return time.Time{}, err
	}
	for line := range strings.Lines(string(data)) {
		if value, ok := strings.CutPrefix(line, "btime "); ok {
			boot, err := strconv.ParseInt(strings.TrimSpace(value), 10, 64)
			if err != nil {
				return time.Time{}, fmt.Errorf("parse %s/stat: %w", root, err)
			}
			ticks := time.Duration(s.StartTime) * (time.Second / userHZ) //nolint:gosec // in this century
			return time.Unix(boot, 0).Add(ticks), nil
		}
	}
	return time.Time{}, fmt.Errorf("%s/stat has no btime", root)
}

// Is reports whether the process of a pid, running or not yet reaped, is the
// one that started at a time.
func Is(pid int, startTime uint64) bool {
	s, err := ReadStat(pid)
	return err == nil && s.StartTime == startTime
}

// Runs reports whether the process that has started at a time still runs.
func Runs(pid int, startTime uint64) bool {
	s, err := ReadStat(pid)
	return err == nil && s.StartTime == startTime && !s.Exited()
}

// Status returns one field of /proc/PID/status, such as "SigCgt", without
// surrounding white space.
func Status(pid int, field string) (string, error) {
	data, err := read(pid, "status")
	if err != nil {
		return "", err
	}
	return statusField(data, pid, field)
}

func statusField(data []byte, pid int, field string) (string, error) {
	for line := range bytes.Lines(data) {
		if name, value, ok := bytes.Cut(line, []byte(":")); ok && string(name) == field {
			return string(bytes.TrimSpace(value)), nil
		}
	}
	return "", fmt.Errorf("/proc/%d/status has no %s", pid, field)
}

// NSPIDs returns the pids of a process in the PID namespace of the /proc mount
// and in each nested one that it is in, the innermost last.
func NSPIDs(pid int) ([]int, error) {
	value, err := Status(pid, "NSpid")
	if err != nil {
		return nil, err
	}
	return parseNSPIDs(value, pid)
}

func parseNSPIDs(value string, pid int) ([]int, error) {
	var pids []int
	for field := range strings.FieldsSeq(value) {
		n, err := strconv.Atoi(field)
		if err != nil {
			return nil, fmt.Errorf("NSpid of process %d: %w", pid, err)
		}
		pids = append(pids, n)
	}
	if len(pids) == 0 {
		return nil, fmt.Errorf("NSpid of process %d is empty", pid)
	}
	return pids, nil
}

// Cmdline returns the command line of a process, none for kernel threads and
// for processes that have exited.
func Cmdline(pid int) ([]string, error) {
	data, err := read(pid, "cmdline")
	if err != nil || len(data) == 0 {
		return nil, err
	}
	return strings.Split(strings.TrimSuffix(string(data), "\x00"), "\x00"), nil
}

// Children returns the pids of the children of a process, at one moment.
func Children(pid int) ([]int, error) {
	tasks, err := os.ReadDir(path(pid, "task"))
	if err != nil {
		return nil, err
	}
	var out []int
	for _, t := range tasks {
		data, err := read(pid, filepath.Join("task", t.Name(), "children"))
		if errors.Is(err, fs.ErrNotExist) {
			continue // the thread has exited, or the kernel lacks CONFIG_PROC_CHILDREN
		}
		if err != nil {
			return nil, err
		}
		for field := range strings.FieldsSeq(string(data)) {
			child, err := strconv.Atoi(field)
			if err != nil {
				return nil, fmt.Errorf("parse the children of process %d: %w", pid, err)
			}
			out = append(out, child)
		}
	}
	return out, nil
}

// SameNamespace reports whether two processes are in the same namespace of a
// kind, such as "mnt".
func SameNamespace(a, b int, kind string) (bool, error) {
	x, err := os.Readlink(path(a, "ns", kind))
	if err != nil {
		return false, err
	}
	y, err := os.Readlink(path(b, "ns", kind))
	return x == y, err
}

// Maps reports whether a process has a file in its memory, by the numbers of
// the file's device and inode as stat(2) returns them. No file system is asked.
func Maps(pid int, device, inode uint64) bool {
	maps, err := os.Open(path(pid, "maps"))
	if err != nil {
		return false
	}
	defer maps.Close()
	want := []string{fmt.Sprintf("%02x:%02x", unix.Major(device), unix.Minor(device)), strconv.FormatUint(inode, 10)}
	lines := bufio.NewReader(maps)
	for {
		line, err := lines.ReadString('\n')
		// Addresses, permissions, offset, device, inode, path.
		if f := strings.Fields(line); len(f) > 4 && slices.Equal(f[3:5], want) {
			return true
		}
		if err != nil {
			return false
		}
	}
}

// WorksIn reports whether a directory is the working directory of a process.
func WorksIn(pid int, dir string) bool {
	cwd, err := os.Stat(path(pid, "cwd"))
	if err != nil {
		return false
	}
	want, err := os.Stat(dir)
	return err == nil && os.SameFile(cwd, want)
}

// FirstLine returns the first line of a file, "" where it cannot be read.
func FirstLine(file string) string {
	data, err := os.ReadFile(file)
	if err != nil {
		return ""
	}
	line, _, _ := strings.Cut(string(data), "\n")
	return line
}

func path(pid int, elem ...string) string {
	return filepath.Join("/proc", strconv.Itoa(pid), filepath.Join(elem...))
}

// read returns [fs.ErrNotExist] for a process that exits meanwhile, too.
func read(pid int, file string) ([]byte, error) {
	data, err := os.ReadFile(path(pid, file))
	if errors.Is(err, unix.ESRCH) {
		return nil, &fs.PathError{Op: "read", Path: path(pid, file), Err: fs.ErrNotExist}
	}
	return data, err
}
