// SPDX-License-Identifier: Apache-2.0

package attributes

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
	"github.com/kata-checkpoint/kata-checkpoint/internal/procfs"
)

// Names of attributes of processes and threads.
const (
	cpus           = "cpus"            // numbers, as in 0,2-3
	timerSlack     = "timer-slack"     // nanoseconds
	ioPriority     = "io-priority"     // see ioprio_set(2)
	coredumpFilter = "coredump-filter" // hexadecimal
)

// references are what a process has that nobody has changed. What is not known is
// not compared.
type references struct {
	cpus           *unix.CPUSet
	slack          string
	priority       int // or -1
	coredumpFilter string
}

func readReferences(cgroup string) references {
	self := os.Getpid()
	r := references{slack: firstLine(self, "timerslack_ns"), coredumpFilter: firstLine(self, "coredump_filter"), cpus: allCPUs(cgroup)}
	var err error
	if r.priority, err = ioprio(self); err != nil {
		r.priority = -1
	}
	return r
}

// allCPUs are those of a cgroup, or of the nearest one above it that has the
// controller, or nil.
func allCPUs(cgroup string) *unix.CPUSet {
	for dir := cgroup; dir != "/" && dir != "."; dir = filepath.Dir(dir) {
		data, err := os.ReadFile(filepath.Join(dir, "cpuset.cpus.effective"))
		if err != nil {
			continue
		}
		if set, err := parseCPUs(strings.TrimSpace(string(data))); err == nil {
			return &set
		}
	}
	set := new(unix.CPUSet)
	if unix.SchedGetaffinity(os.Getpid(), set) != nil {
		return nil
	}
	return set
}

func firstLine(pid int, name string) string {
	return procfs.FirstLine(fmt.Sprintf("/proc/%d/%s", pid, name))
}

func (r *reader) process(p *inspect.Process) {
	if filter := firstLine(p.PID, "coredump_filter"); filter != "" && r.coredumpFilter != "" && filter != r.coredumpFilter {
		r.add(p, 0, coredumpFilter, filter)
	}
	threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", p.PID))
	if err != nil {
		return // it has exited
	}
	for _, t := range threads {
		tid, err := strconv.Atoi(t.Name())
		if err != nil {
			continue
		}
		inside := 0
		if tid != p.PID {
			pids, err := procfs.NSPIDs(tid)
			if err != nil || len(pids) < r.depth {
				continue
			}
			inside = pids[r.depth-1]
		}
		r.readThread(p, tid, inside)
	}
}

func (r *reader) readThread(p *inspect.Process, tid, inside int) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(tid, &set); err == nil && r.cpus != nil && !contains(&set, r.cpus) {
		r.add(p, inside, cpus, formatCPUs(&set))
	}
	// Real-time threads have none.
	if slack := firstLine(tid, "timerslack_ns"); slack != "" && slack != "0" && r.slack != "" && slack != r.slack {
		r.add(p, inside, timerSlack, slack)
	}
	if priority, err := ioprio(tid); err == nil && r.priority >= 0 && priority != r.priority {
		r.add(p, inside, ioPriority, strconv.Itoa(priority))
	}
}

// Of linux/ioprio.h.
const (
	ioprioProcess    = 1  // IOPRIO_WHO_PROCESS
	ioprioClassShift = 13 // IOPRIO_CLASS_SHIFT
	ioprioRealTime   = 1  // IOPRIO_CLASS_RT
	ioprioIdle       = 3  // IOPRIO_CLASS_IDLE
)

func ioprio(tid int) (int, error) {
	n, _, errno := unix.Syscall(unix.SYS_IOPRIO_GET, ioprioProcess, uintptr(tid), 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

func (w *writer) applyThread(pid, tid int, name, value string) error {
	write := func(pid int, file string) error {
		return os.WriteFile(fmt.Sprintf("/proc/%d/%s", pid, file), []byte(value), 0)
	}
	switch name {
	case cpus:
		set, err := parseCPUs(value)
		if err != nil {
			return err
		}
		return unix.SchedSetaffinity(tid, &set)
	case timerSlack:
		if n, err := strconv.ParseUint(value, 10, 64); err != nil || n == 0 {
			return errValue
		}
		return write(tid, "timerslack_ns")
	case coredumpFilter:
		if _, err := strconv.ParseUint(value, 16, 32); err != nil {
			return errValue
		}
		value = "0x" + value
		return write(pid, "coredump_filter")
	case ioPriority:
		n, err := strconv.ParseUint(value, 10, 16)
		if err != nil || n>>ioprioClassShift > ioprioIdle {
			return errValue
		}
		if n>>ioprioClassShift == ioprioRealTime && !w.SysNice {
			return errPrivilege
		}
		if _, _, errno := unix.Syscall(unix.SYS_IOPRIO_SET, ioprioProcess, uintptr(tid), uintptr(n)); errno != 0 {
			return errno
		}
		return nil
	}
	return errName
}

var (
	errProcess   = errors.New("it is not among the restored ones")
	errName      = errors.New("this release does not know it")
	errValue     = errors.New("its value is invalid")
	errPrivilege = errors.New("the container lacks the capability that it needs")
)

// maxCPU is the highest number of a CPU, as in [unix.CPUSet].
const maxCPU = 1023

// parseCPUs reads a list such as 0,2-3.
func parseCPUs(s string) (set unix.CPUSet, err error) {
	for part := range strings.SplitSeq(s, ",") {
		from, to, isRange := strings.Cut(part, "-")
		if !isRange {
			to = from
		}
		a, errA := strconv.ParseUint(from, 10, 16)
		b, errB := strconv.ParseUint(to, 10, 16)
		if errA != nil || errB != nil || a > b || b > maxCPU {
			return set, errValue
		}
		for ; a <= b; a++ {
			set.Set(int(a))
		}
	}
	return set, nil
}

func formatCPUs(set *unix.CPUSet) string {
	var parts []string
	for from := 0; from <= maxCPU; from++ {
		if !set.IsSet(from) {
			continue
		}
		to := from
		for to < maxCPU && set.IsSet(to+1) {
			to++
		}
		part := strconv.Itoa(from)
		if to > from {
			part += "-" + strconv.Itoa(to)
		}
		parts = append(parts, part)
		from = to
	}
	return strings.Join(parts, ",")
}

// contains reports whether a set has all CPUs of another one.
func contains(set, other *unix.CPUSet) bool {
	for i := range set {
		if other[i]&^set[i] != 0 {
			return false
		}
	}
	return true
}
