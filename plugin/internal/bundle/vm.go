package bundle

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// vmName is our file in the bundle of a sandbox that names its VM's process.
const vmName = "kata-checkpoint.vm"

// SetVM notes the process that Kata gives as a sandbox's: its VMM.
func SetVM(dir string, pid int) error {
	start, err := StartTime(pid)
	if err != nil {
		return err
	}
	return replaceFile(filepath.Join(dir, vmName), fmt.Appendf(nil, "%d %d\n", pid, start))
}

// VM returns what was noted: the pid, and when the process started (see
// [StartTime]). The pid is 0 where nothing was.
func VM(dir string) (pid int, start uint64, err error) {
	data, err := os.ReadFile(filepath.Join(dir, vmName))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, 0, nil
	}
	if err != nil {
		return 0, 0, err
	}
	if _, err := fmt.Sscanf(string(data), "%d %d\n", &pid, &start); err != nil {
		return 0, 0, fmt.Errorf("%s: %w", vmName, err)
	}
	return pid, start, nil
}

// VMEnded says whether the VM that was noted has ended. Where none was, nobody
// knows.
func VMEnded(dir string) bool {
	pid, start, err := VM(dir)
	if err != nil || pid == 0 {
		return false
	}
	at, state, err := stat(pid)
	return errors.Is(err, fs.ErrNotExist) || err == nil && (at != start || state == "Z" || state == "X")
}

// StartTime is when a process started, in clock ticks after boot. With it a
// pid names one process and no later one.
func StartTime(pid int) (uint64, error) {
	start, _, err := stat(pid)
	return start, err
}

func stat(pid int) (start uint64, state string, err error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, "", err
	}
	// The name in parentheses may hold anything.
	i := strings.LastIndexByte(string(data), ')')
	fields := strings.Fields(string(data[i+1:]))
	const startTime = 22 - 3 // proc(5) counts from 1, and pid and name are cut off
	if i < 0 || len(fields) <= startTime {
		return 0, "", fmt.Errorf("/proc/%d/stat cannot be read", pid)
	}
	start, err = strconv.ParseUint(fields[startTime], 10, 64)
	return start, fields[0], err
}
