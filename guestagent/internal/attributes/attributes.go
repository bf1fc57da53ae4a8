// SPDX-License-Identifier: Apache-2.0

// Package attributes saves and restores what CRIU 4.2 leaves out of its images of
// threads without a word: the CPUs that they run on, timer slack, I/O priority, and
// the filter for core dumps.
//
// [Read] looks at frozen processes, and lists what differs from what the kernel
// gives to a new one. [Apply] sets it in restored processes, from outside, before
// they run. Every attribute has a name in a table here and a value in text, and
// nothing else of an image set is used. What needs a privilege is set for
// containers that have it.
//
// It relies on Linux 6.18.
package attributes

import (
	"context"
	"fmt"
	"path/filepath"
	"strconv"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/procfs"
)

// Max bounds the attributes of a container. Those beyond it are left out.
const Max = 1 << 15

// Read lists the attributes of a container's threads, which are frozen, and
// reports whether that is all of them. Cgroup is the container's.
func Read(ctx context.Context, look *inspect.Container, cgroup string) (_ []*api.Attribute, all bool, _ error) {
	r := reader{depth: len(look.Root.PIDs), references: readReferences(cgroup)}
	for _, p := range look.Processes {
		if ctx.Err() != nil {
			return nil, false, fmt.Errorf("read attributes: %w", context.Cause(ctx))
		}
		if len(p.PIDs) >= r.depth {
			r.process(p)
		}
		if len(r.out) > Max {
			return r.out[:Max], false, nil
		}
	}
	return r.out, true, nil
}

// reader collects attributes.
type reader struct {
	// depth is how many PID namespaces the container's is below the guest's, plus 1.
	depth int
	out   []*api.Attribute
	references
}

func (r *reader) add(p *inspect.Process, thread int, name, value string) {
	r.out = append(r.out, &api.Attribute{Pid: number(p.PIDs[r.depth-1]), Thread: number(thread), Name: name, Value: value})
}

func number(pid int) uint32 { return uint32(pid) } //nolint:gosec // not negative

// Target is what attributes are applied to.
type Target struct {
	// PIDs are the restored processes, which are frozen, in the guest's root PID
	// namespace.
	PIDs []int
	// SysNice: the container may have CAP_SYS_NICE.
	SysNice bool
}

// Apply sets attributes of restored threads. It returns those that cannot be set,
// each with the reason: the new guest may lack a CPU, for example.
func Apply(ctx context.Context, t Target, list []*api.Attribute) (failed []error, err error) {
	processes := make(map[uint32]int)
	for _, pid := range t.PIDs {
		pids, err := procfs.NSPIDs(pid)
		if err != nil {
			return nil, err
		}
		processes[number(pids[len(pids)-1])] = pid
	}
	w := writer{Target: t}
	for _, a := range list {
		if ctx.Err() != nil {
			return nil, fmt.Errorf("set attributes: %w", context.Cause(ctx))
		}
		if err := w.apply(processes, a); err != nil {
			failed = append(failed, fmt.Errorf("%s=%s of process %d in the container: %w", a.GetName(), a.GetValue(), a.GetPid(), err))
		}
	}
	return failed, nil
}

// writer sets attributes.
type writer struct {
	Target
	// threads are those of the process pid, by their PIDs in the container.
	pid     int
	threads map[uint32]int
}

func (w *writer) apply(processes map[uint32]int, a *api.Attribute) error {
	pid, ok := processes[a.GetPid()]
	if !ok {
		return errProcess
	}
	tid := pid
	if a.GetThread() != 0 {
		var err error
		if tid, err = w.thread(pid, a.GetThread()); err != nil {
			return err
		}
	}
	return w.applyThread(pid, tid, a.GetName(), a.GetValue())
}

// thread finds a thread of a process by its PID in the container.
func (w *writer) thread(pid int, inside uint32) (int, error) {
	if w.pid != pid {
		found, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
		if err != nil {
			return 0, err
		}
		w.pid, w.threads = pid, make(map[uint32]int, len(found))
		for _, path := range found {
			tid, err := strconv.Atoi(filepath.Base(path))
			if err != nil {
				continue
			}
			pids, err := procfs.NSPIDs(tid)
			if err != nil {
				return 0, err
			}
			w.threads[number(pids[len(pids)-1])] = tid
		}
	}
	tid, ok := w.threads[inside]
	if !ok {
		return 0, fmt.Errorf("it has no thread %d", inside)
	}
	return tid, nil
}
