package agent

import (
	"errors"
	"fmt"
	"os"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/cgroup"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/netlock"
)

// lockName is the name of a container's network lock.
func lockName(id string) string { return "kata-checkpoint-" + id }

// lockNetwork drops the packets of a container's TCP connections before a dump:
// from now on its peers notice nothing, not even that the container exits, and
// nothing that they send is acknowledged.
func (a *Agent) lockNetwork(c *container, list []inspect.Connection) error {
	if len(list) == 0 {
		return nil
	}
	// Recorded first, so that Thaw and Forget undo it whatever happens next.
	c.NetworkLocked = true
	if err := a.save(c); err != nil {
		return err
	}
	return netlock.Lock(lockName(c.ID), list)
}

// unlockNetwork undoes lockNetwork, and repair mode. The processes are still
// frozen, or gone.
func (a *Agent) unlockNetwork(c *container) error {
	if !c.NetworkLocked {
		return nil
	}
	pids, err := cgroup.Procs(c.tree(), true)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("list the processes of the container: %w", err)
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
	c.NetworkLocked = false
	return a.save(c)
}
