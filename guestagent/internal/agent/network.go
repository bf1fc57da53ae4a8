// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/cgroup"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/criu"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/netlock"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
)

// lockName is the name of a container's network lock.
func lockName(id string) string { return "kata-checkpoint-" + id }

// keepsConnections reports whether the open TCP connections of a container go into
// its image set.
func keepsConnections(list []inspect.Connection, o *api.CheckpointOptions) bool {
	// Others than those inside have been refused where nothing is said about them.
	return !o.GetTcpClose() && (o.GetTcpEstablished() || len(list) > 0)
}

// lockNetwork locks connections: until unlocked, nothing that happens here, not
// even the end of the container, reaches a peer, nor is anything that a peer sends
// acknowledged. It notes first that connections may be locked, by the agent or by
// CRIU, and their sockets in repair mode: whatever comes then, Thaw and Forget undo
// it.
func (a *Agent) lockNetwork(c *container, list []inspect.Connection) error {
	c.NetworkLocked = true
	if err := a.save(c); err != nil || len(list) == 0 {
		return err
	}
	return netlock.Lock(lockName(c.ID), list)
}

// unlockNetwork undoes lockNetwork, of whose connections the processes are still
// frozen, or gone.
func (a *Agent) unlockNetwork(ctx context.Context, c *container) error {
	if !c.NetworkLocked {
		return nil
	}
	pids, err := cgroup.Procs(c.tree(), true)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("list the processes of the container: %w", err)
	}
	processes, err := inspect.Processes(ctx, pids)
	if err != nil {
		return err
	}
	list, err := inspect.Connections(processes)
	if err != nil {
		return err
	}
	if err := errclass.Join(netlock.LeaveRepair(list), netlock.Unlock(lockName(c.ID))); err != nil {
		return err
	}
	return a.noteUnlocked(c)
}

func (a *Agent) noteUnlocked(c *container) error {
	c.NetworkLocked = false
	return a.save(c)
}

// removeCRIULock removes the network lock of a dump whose CRIU has died.
func removeCRIULock(op *criu.Op) error {
	run := criu.RunID(op.LogPath())
	if run == "" {
		return nil // it died before it locked anything
	}
	return netlock.RemoveStale(run)
}

// connectionsOf are those of a message.
func connectionsOf(list []*api.Connection) ([]inspect.Connection, error) {
	out := make([]inspect.Connection, 0, len(list))
	for _, c := range list {
		local, lerr := netip.ParseAddrPort(c.GetLocal())
		remote, rerr := netip.ParseAddrPort(c.GetRemote())
		if err := errclass.Join(lerr, rerr); err != nil {
			return nil, errclass.Invalid("TCP connection from %q to %q: %w", c.GetLocal(), c.GetRemote(), err)
		}
		out = append(out, inspect.Connection{Local: local, Remote: remote})
	}
	return out, nil
}

func socketsOf(list []inspect.Connection) []criu.Socket {
	out := make([]criu.Socket, 0, len(list))
	for _, c := range list {
		out = append(out, criu.Socket{PID: c.PID, FD: c.FD})
	}
	return out
}

func connectionMessages(list []inspect.Connection) []*api.Connection {
	out := make([]*api.Connection, 0, len(list))
	for _, c := range list {
		out = append(out, &api.Connection{Local: c.Local.String(), Remote: c.Remote.String()})
	}
	return out
}
