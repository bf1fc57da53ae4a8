package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/cgroup"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/criu"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/enter"
	"github.com/kata-checkpoint/kata-checkpoint/internal/procfs"
)

// The processes of a container that shares its pod's PID namespace are not the
// tree of a PID 1, and no PID namespace is in its image set: they are restored,
// with the pids that they had, into one that is made for them below the
// placeholder's, with an init of ours.

// makeNamespace makes a PID namespace in the placeholder's, with all else as the
// placeholder's, and returns the pid of its init, which is in the placeholder's
// cgroup: it is no part of what is frozen and checkpointed.
func (a *Agent) makeNamespace(c *container) (int, error) {
	process, err := json.Marshal(specs.Process{NoNewPrivileges: true})
	if err != nil {
		return 0, err
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	prepared, err := enter.Prepare(enter.Request{Target: c.Init.PID, Cgroup: c.Cgroup, Process: process, Init: true})
	if err != nil {
		return 0, fmt.Errorf("make a PID namespace: %w", err)
	}
	defer prepared.Close()
	fd := int(null.Fd())
	inside, err := prepared.Run(criu.Helper, [3]int{fd, fd, fd})
	if err != nil {
		return 0, fmt.Errorf("make a PID namespace: %w", err)
	}
	pids, err := cgroup.Procs(c.Cgroup, false)
	if err != nil {
		return 0, fmt.Errorf("look for the init of the new PID namespace: %w", err)
	}
	for _, pid := range pids {
		// Its pids are the guest's root one, the placeholder's namespace's, and 1.
		if ns, err := procfs.NSPIDs(pid); err == nil && len(ns) > 2 && ns[len(ns)-1] == 1 && ns[len(ns)-2] == inside {
			return pid, nil
		}
	}
	return 0, errors.New("the init of the new PID namespace has ended")
}
