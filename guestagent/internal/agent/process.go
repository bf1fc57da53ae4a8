package agent

import (
	"os"
	"strconv"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
)

// process tells one process from a later one of the same pid.
type process struct {
	PID int `json:"pid"`
	// Start is the process's start time in clock ticks since boot (proc(5), stat field 22).
	Start uint64 `json:"start"`
}

func newProcess(pid int) (process, error) {
	start, err := inspect.StartTime(pid)
	return process{PID: pid, Start: start}, err
}

// alive says whether the process exists and has not ended.
func (p process) alive() bool {
	fields, err := inspect.StatFields(p.PID)
	if err != nil || len(fields) < 20 {
		return false
	}
	start, err := strconv.ParseUint(fields[19], 10, 64)
	return err == nil && start == p.Start && fields[0] != "Z" && fields[0] != "X"
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
