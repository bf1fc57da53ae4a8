package agent

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/rawfile"
)

// process tells one process from a later one of the same pid.
type process struct {
	PID int `json:"pid"`
	// Start is the process's start time in clock ticks since boot (proc(5), stat field 22).
	Start uint64 `json:"start"`
}

func newProcess(pid int) (process, error) {
	start, err := startTime(pid)
	return process{PID: pid, Start: start}, err
}

// alive says whether the process exists and has not ended.
func (p process) alive() bool {
	fields, err := statFields(p.PID)
	if err != nil || len(fields) < 20 {
		return false
	}
	start, err := strconv.ParseUint(fields[19], 10, 64)
	return err == nil && start == p.Start && fields[0] != "Z" && fields[0] != "X"
}

// statFields returns the fields of /proc/PID/stat from the third one on.
func statFields(pid int) ([]string, error) {
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

func startTime(pid int) (uint64, error) {
	fields, err := statFields(pid)
	if err != nil {
		return 0, err
	}
	if len(fields) < 20 {
		return 0, fmt.Errorf("/proc/%d/stat has %d fields", pid, len(fields))
	}
	return strconv.ParseUint(fields[19], 10, 64)
}

// parentOf returns the pid of a process's parent; 0: it has none that is seen here.
func parentOf(pid int) (int, error) {
	fields, err := statFields(pid)
	if err != nil {
		return 0, err
	}
	if len(fields) < 2 {
		return 0, fmt.Errorf("/proc/%d/stat has %d fields", pid, len(fields))
	}
	return strconv.Atoi(fields[1])
}

// oldest returns the process that was started first, which of a container's
// processes is its init.
func oldest(pids []int) (process, error) {
	var found process
	for _, pid := range pids {
		p, err := newProcess(pid)
		if err != nil {
			continue // ended meanwhile
		}
		if found.PID == 0 || p.Start < found.Start || p.Start == found.Start && p.PID < found.PID {
			found = p
		}
	}
	if found.PID == 0 {
		return process{}, os.ErrNotExist
	}
	return found, nil
}

// nsPIDs returns the pids of a process from the guest's root namespace inwards.
func nsPIDs(pid int) ([]int, error) {
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

// sameNamespace says whether two processes are in the same namespace of a kind.
func sameNamespace(a, b int, kind string) (bool, error) {
	x, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", a, kind))
	if err != nil {
		return false, err
	}
	y, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", b, kind))
	return x == y, err
}

// cpuFeatures are the instruction set extensions of the guest's processor: a
// process that found one at its start may use it for ever.
func cpuFeatures() ([]string, error) {
	data, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(data)) {
		name, value, ok := strings.Cut(line, ":")
		if name = strings.TrimSpace(name); !ok || name != "flags" && name != "Features" {
			continue
		}
		var out []string
		for _, f := range strings.Fields(value) {
			if instructionSet(f) {
				out = append(out, f)
			}
		}
		slices.Sort(out)
		return out, nil
	}
	return nil, nil
}

// instructionSet leaves out what only the kernel or the VMM sees of a
// processor, so that a restore is not refused for it.
func instructionSet(flag string) bool {
	for _, prefix := range []string{"sse", "ssse", "avx", "amx", "bmi", "fma", "xsave", "sha", "aes", "vaes", "vpclmul", "asimd", "sve"} {
		if strings.HasPrefix(flag, prefix) {
			return true
		}
	}
	return slices.Contains([]string{"fpu", "mmx", "fxsr", "pni", "popcnt", "pclmulqdq", "movbe", "rdrand", "rdseed", "adx", "abm", "lahf_lm",
		"cx16", "cx8", "cmov", "f16c", "gfni", "fsgsbase", "rdpid", "rdtscp", "movdiri", "movdir64b", "clflushopt", "clwb", "fp", "crc32", "atomics",
		"pmull", "serialize", "waitpkg", "3dnow", "3dnowext", "3dnowprefetch", "tbm", "xop", "fma4", "sme", "sme2"}, flag)
}

// missing returns the elements of want that are not in have.
func missing(want, have []string) []string {
	var out []string
	for _, w := range want {
		if !slices.Contains(have, w) {
			out = append(out, w)
		}
	}
	return out
}

func kernelRelease() string {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return ""
	}
	return unix.ByteSliceToString(name.Release[:])
}

func bootID() string { return firstLine("/proc/sys/kernel/random/boot_id") }

func firstLine(path string) string {
	data, err := os.ReadFile(filepath.Clean(path))
	if err != nil {
		return ""
	}
	line, _, _ := strings.Cut(string(data), "\n")
	return line
}
