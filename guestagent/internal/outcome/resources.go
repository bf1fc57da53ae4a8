// SPDX-License-Identifier: Apache-2.0

package outcome

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/sys/capability"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/procfs"
)

// limitNames are those of resource limits, by their numbers.
var limitNames = []string{
	unix.RLIMIT_CPU: "CPU", unix.RLIMIT_FSIZE: "FSIZE", unix.RLIMIT_DATA: "DATA", unix.RLIMIT_STACK: "STACK",
	unix.RLIMIT_CORE: "CORE", unix.RLIMIT_RSS: "RSS", unix.RLIMIT_NPROC: "NPROC", unix.RLIMIT_NOFILE: "NOFILE",
	unix.RLIMIT_MEMLOCK: "MEMLOCK", unix.RLIMIT_AS: "AS", unix.RLIMIT_LOCKS: "LOCKS", unix.RLIMIT_SIGPENDING: "SIGPENDING",
	unix.RLIMIT_MSGQUEUE: "MSGQUEUE", unix.RLIMIT_NICE: "NICE", unix.RLIMIT_RTPRIO: "RTPRIO", unix.RLIMIT_RTTIME: "RTTIME",
}

func hardLimits(pid int) ([]uint64, error) {
	out := make([]uint64, len(limitNames))
	for resource := range limitNames {
		var l unix.Rlimit
		if err := unix.Prlimit(pid, resource, nil, &l); err != nil {
			return nil, fmt.Errorf("resource limits of process %d: %w", pid, err)
		}
		out[resource] = l.Max
	}
	return out, nil
}

// addLimits allows the limits of the agent, which those of Kata's execs are that
// get none of their own.
func (c *Container) addLimits() error {
	own, err := hardLimits(os.Getpid())
	for resource := range own {
		c.limits[resource] = max(c.limits[resource], own[resource])
	}
	return err
}

func oomScore(pid int) (int, error) {
	path := fmt.Sprintf("/proc/%d/oom_score_adj", pid)
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	score, err := strconv.Atoi(strings.TrimSpace(string(data)))
	if err != nil {
		return 0, fmt.Errorf("parse %s: %w", path, err)
	}
	return score, nil
}

// label returns the label that a security module has given to a process, "" where
// there is none.
func label(pid int) string {
	return strings.TrimRight(procfs.FirstLine(fmt.Sprintf("/proc/%d/attr/current", pid)), "\x00")
}

// memoryLimits are limits that the kernel derives from the size of its memory
// (kernel/fork.c, fork_init).
var memoryLimits = []int{unix.RLIMIT_NPROC, unix.RLIMIT_SIGPENDING}

// lower lowers a limit of a process to that of the container.
func (k *check) lower(pid, resource int) error {
	var l unix.Rlimit
	err := unix.Prlimit(pid, resource, nil, &l)
	if err == nil {
		l.Max = k.limits[resource]
		l.Cur = min(l.Cur, l.Max)
		err = unix.Prlimit(pid, resource, &l, nil)
	}
	if err != nil {
		return fmt.Errorf("lower the limit %s of process %d: %w", limitNames[resource], pid, err)
	}
	return nil
}

// resources checks what a process can use of the guest.
func (k *check) resources(pid int) error {
	limits, err := hardLimits(pid)
	if err != nil {
		return err
	}
	score, err := oomScore(pid)
	if err != nil {
		return err
	}
	raise, err := k.able(capability.CAP_SYS_RESOURCE)
	if err != nil {
		return err
	}
	for resource, most := range k.limits {
		if limits[resource] <= most || raise {
			continue
		}
		// A guest with more memory gives more of these to each container.
		if slices.Contains(memoryLimits, resource) {
			if k.running {
				continue // until it is restored
			}
			if err := k.lower(pid, resource); err != nil {
				return err
			}
		} else {
			k.find(pid, "has the limit %s %s, and the container %s", limitNames[resource], limit(limits[resource]), limit(most))
		}
	}
	if score < k.oomScore && !raise {
		k.find(pid, "has the oom_score_adj %d, and the container %d", score, k.oomScore)
	}
	if have := label(pid); have != k.label && !k.running {
		k.find(pid, "has the security label %q, and the container %q", have, k.label)
	}
	return nil
}

func limit(n uint64) string {
	if n == unix.RLIM_INFINITY {
		return "unlimited"
	}
	return strconv.FormatUint(n, 10)
}

// Scheduling policies, see sched(7).
const (
	schedFIFO     = 1
	schedRR       = 2
	schedDeadline = 6
)

// scheduling checks the scheduling of a thread: the limits NICE and RTPRIO are as
// in setrlimit(2).
func (k *check) scheduling(pid, tid int) error {
	attr, err := unix.SchedGetAttr(tid, 0)
	if err != nil {
		return fmt.Errorf("scheduling of thread %d: %w", tid, err)
	}
	realtime := attr.Policy == schedFIFO || attr.Policy == schedRR || attr.Policy == schedDeadline
	if !realtime && attr.Nice >= 0 {
		return nil
	}
	if nice, err := k.able(capability.CAP_SYS_NICE); nice || err != nil {
		return err
	}
	if realtime && (attr.Policy == schedDeadline || uint64(attr.Priority) > k.limits[unix.RLIMIT_RTPRIO]) {
		k.find(pid, "has a real-time priority, which the container cannot have")
	}
	if own, err := unix.SchedGetAttr(k.pid, 0); err != nil {
		return fmt.Errorf("scheduling of the placeholder: %w", err)
	} else if lowest := 20 - int64(min(k.limits[unix.RLIMIT_NICE], 40)); int64(attr.Nice) < min(int64(own.Nice), lowest) {
		k.find(pid, "has the nice value %d, which the container cannot have", attr.Nice)
	}
	return nil
}
