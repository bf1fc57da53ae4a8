// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"os"

	"github.com/kata-checkpoint/kata-checkpoint/internal/procfs"
)

// process identifies a process, as opposed to a later one with the same PID.
type process struct {
	PID int `json:"pid"`
	// Start is the process's start time in clock ticks since boot (proc(5),
	// stat field 22).
	Start uint64 `json:"start"`
}

func newProcess(pid int) (process, error) {
	start, err := procfs.StartTime(pid)
	return process{PID: pid, Start: start}, err
}

// alive reports whether the process exists and has not exited.
func (p process) alive() bool { return procfs.Runs(p.PID, p.Start) }

// oldest returns the process that was started first, which of a container's
// processes is its init.
func oldest(pids []int) (process, error) {
	var found process
	for _, pid := range pids {
		p, err := newProcess(pid)
		if err != nil {
			continue // exited meanwhile
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
