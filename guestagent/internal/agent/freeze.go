// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/cgroup"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/procfs"
)

// How often a container is frozen again while a process is between vfork(2) and
// the program that it is to execute. The pauses between grow by forkPause each
// time: equal ones would meet a process that forks at regular intervals at the
// same point again and again.
const (
	forkTries = 40
	forkPause = time.Millisecond
)

// freeze freezes the processes of a container. A moment in which one has just been
// made by vfork is not one to stop at: its parent waits in the kernel until it
// executes a program or exits, where CRIU cannot stop it.
func (c *container) freeze(ctx context.Context) error {
	for try := 1; ; try++ {
		if err := cgroup.Freeze(ctx, c.tree()); err != nil {
			return err
		}
		forking, err := c.forking()
		if err == nil && (!forking || try == forkTries) {
			return nil // a checkpoint says so, should it still be so
		}
		if err := errclass.Join(err, cgroup.Thaw(c.tree())); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("freeze: %w", context.Cause(ctx))
		case <-time.After(time.Duration(try) * forkPause):
		}
	}
}

// forking reports whether one of a container's processes, which are frozen, shares
// its parent's memory.
func (c *container) forking() (bool, error) {
	pids, err := cgroup.Procs(c.tree(), true)
	if err != nil {
		return false, fmt.Errorf("list the processes: %w", err)
	}
	return slices.ContainsFunc(pids, func(pid int) bool {
		stat, err := procfs.ReadStat(pid)
		return err == nil && slices.Contains(pids, stat.Parent) && inspect.SharesMemory(pid, stat.Parent)
	}), nil
}
