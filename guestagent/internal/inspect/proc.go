// Package inspect looks at a container's processes without changing them: what
// they have open and mapped, their sockets, mounts and namespaces, and what of
// it CRIU cannot checkpoint. The agent calls it before it freezes a container,
// and again once the processes are frozen. While they run, whatever is read may
// be outdated by the time it is returned, and a process that exits meanwhile is
// left out.
package inspect

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/rawfile"
	"github.com/kata-checkpoint/kata-checkpoint/internal/thread"
)

// StatFields returns the fields of /proc/PID/stat from the third one on.
func StatFields(pid int) ([]string, error) {
	data, err := rawfile.Read(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil, err
	}
	// The second field, the command's name, is in parentheses and may hold some.
	i := bytes.LastIndexByte(data, ')')
	if i < 0 {
		return nil, fmt.Errorf("/proc/%d/stat has no command", pid)
	}
	return strings.Fields(string(data[i+1:])), nil
}

func StartTime(pid int) (uint64, error) {
	fields, err := StatFields(pid)
	if err != nil {
		return 0, err
	}
	if len(fields) < 20 {
		return 0, fmt.Errorf("/proc/%d/stat has %d fields", pid, len(fields))
	}
	return strconv.ParseUint(fields[19], 10, 64)
}

// ParentOf returns the pid of a process's parent; 0: it has none that is seen here.
func ParentOf(pid int) (int, error) {
	fields, err := StatFields(pid)
	if err != nil {
		return 0, err
	}
	if len(fields) < 2 {
		return 0, fmt.Errorf("/proc/%d/stat has %d fields", pid, len(fields))
	}
	return strconv.Atoi(fields[1])
}

// NSPIDs returns the pids of a process from the guest's root namespace inwards.
func NSPIDs(pid int) ([]int, error) {
	data, err := rawfile.Read(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(data)) {
		rest, ok := strings.CutPrefix(line, "NSpid:")
		if !ok {
			continue
		}
		var pids []int
		for _, f := range strings.Fields(rest) {
			n, err := strconv.Atoi(f)
			if err != nil {
				return nil, fmt.Errorf("NSpid of process %d: %w", pid, err)
			}
			pids = append(pids, n)
		}
		return pids, nil
	}
	return nil, fmt.Errorf("process %d has no NSpid", pid)
}

// SameNamespace says whether two processes are in the same namespace of a kind.
func SameNamespace(a, b int, kind string) (bool, error) {
	x, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", a, kind))
	if err != nil {
		return false, err
	}
	y, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", b, kind))
	return x == y, err
}

func firstLine(path string) string {
	data, err := os.ReadFile(filepath.Clean(path))
	if err != nil {
		return ""
	}
	line, _, _ := strings.Cut(string(data), "\n")
	return line
}

// OwnPIDNamespace says whether a process is the first of its pid namespace. If
// not, the namespace is another container's, or was.
func OwnPIDNamespace(pid int) (bool, error) {
	pids, err := NSPIDs(pid)
	if err != nil {
		return false, err
	}
	return pids[len(pids)-1] == 1, nil
}

// Hostname is the one that a process sees.
func Hostname(pid int) (string, error) {
	var name unix.Utsname
	err := thread.Do(func() error {
		if err := thread.Enter(pid, "uts"); err != nil {
			return err
		}
		return unix.Uname(&name)
	})
	if err != nil {
		return "", fmt.Errorf("hostname of the container: %w", err)
	}
	return unix.ByteSliceToString(name.Nodename[:]), nil
}
