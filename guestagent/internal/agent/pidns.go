package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/cgroup"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/enter"
	"github.com/kata-checkpoint/kata-checkpoint/internal/procfs"
)

// A container that shares its pod's pid namespace is no first process's tree,
// and no pid namespace is in its image set: its processes are restored, with
// the pids that they had, into one that is made for them below the
// placeholder's. Its first process is [FirstMode]'s.

// makeNamespace makes a pid namespace in the placeholder's, with all else as the
// placeholder's, and returns the pid of its first process, which is in the
// placeholder's cgroup: it is no part of what is frozen and checkpointed.
func (a *Agent) makeNamespace(c *container) (int, error) {
	binary, err := placeholderPath(c.Init.PID)
	if err != nil {
		return 0, err
	}
	process, err := json.Marshal(specs.Process{Args: []string{binary, FirstMode}, Env: []string{"HOME=/"}, NoNewPrivileges: true})
	if err != nil {
		return 0, err
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	entered, err := a.spawner.Enter(enter.Request{Target: c.Init.PID, Cgroup: c.Cgroup, Process: process, First: true})
	if err != nil {
		return 0, fmt.Errorf("make a pid namespace: %w", err)
	}
	defer entered.Close()
	fd := int(null.Fd())
	inside, err := entered.Run([3]int{fd, fd, fd})
	if err != nil {
		return 0, fmt.Errorf("make a pid namespace: %w", err)
	}
	pids, err := cgroup.Procs(c.Cgroup, false)
	if err != nil {
		return 0, fmt.Errorf("look for the pid namespace's first process: %w", err)
	}
	for _, pid := range pids {
		// Its pids are the guest's root one, the placeholder's namespace's, and 1.
		if ns, err := procfs.NSPIDs(pid); err == nil && len(ns) > 2 && ns[len(ns)-1] == 1 && ns[len(ns)-2] == inside {
			return pid, nil
		}
	}
	return 0, errors.New("the first process of the new pid namespace has ended")
}
