package agent

import (
	"errors"
	"fmt"
	"os"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/cgroup"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/netlock"
)

// lockName names a container's lock among nftables' tables.
func lockName(id string) string { return "kata-checkpoint-" + id }

// silence cuts a container's TCP connections off: from now on nothing that
// happens here, not even the end of the container, reaches a peer, nor is
// anything that a peer sends acknowledged. It comes before a dump.
func (a *Agent) silence(c *container, list []inspect.Connection) error {
	if len(list) == 0 {
		return nil
	}
	// Noted first: whatever comes then, Thaw and Forget undo it.
	c.Silent = true
	if err := a.save(c); err != nil {
		return err
	}
	return netlock.Lock(lockName(c.ID), list)
}

// speak undoes silence. The processes are still frozen, or gone.
func (a *Agent) speak(c *container) error {
	if !c.Silent {
		return nil
	}
	pids, err := cgroup.Procs(c.tree(), true)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("processes of the container: %w", err)
	}
	processes, err := inspect.Processes(pids)
	if err != nil {
		return err
	}
	list, err := inspect.Connections(processes)
	if err != nil {
		return err
	}
	if err := errors.Join(netlock.LeaveRepair(list), netlock.Unlock(lockName(c.ID))); err != nil {
		return err
	}
	c.Silent = false
	return a.save(c)
}
