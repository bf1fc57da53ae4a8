// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
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

// A container that shares its pod's PID namespace has no PID 1 of its own, and
// its image set contains no PID namespace. Its processes are restored, with the
// PIDs that they had, into one that is created for them below the placeholder's,
// with an init of ours.

// makeNamespace creates a PID namespace below the placeholder's and returns the
// PID of its init. Everything else of the init is as the placeholder's; being in
// the placeholder's cgroup, it is neither frozen nor checkpointed.
func (a *Agent) makeNamespace(ctx context.Context, c *container) (int, error) {
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
		return 0, fmt.Errorf("create a PID namespace: %w", err)
	}
	defer prepared.Close()
	fd := int(null.Fd())
	inside, err := prepared.Run(ctx, criu.Helper, [3]int{fd, fd, fd}, nil)
	if err != nil {
		return 0, fmt.Errorf("create a PID namespace: %w", err)
	}
	pids, err := cgroup.Procs(c.Cgroup, false)
	if err != nil {
		return 0, fmt.Errorf("look for the init of the new PID namespace: %w", err)
	}
	for _, pid := range pids {
		// Its PIDs are those in the guest's root namespace and in the
		// placeholder's, and 1.
		if ns, err := procfs.NSPIDs(pid); err == nil && len(ns) > 2 && ns[len(ns)-1] == 1 && ns[len(ns)-2] == inside {
			return pid, nil
		}
	}
	return 0, errors.New("the init of the new PID namespace has exited")
}
