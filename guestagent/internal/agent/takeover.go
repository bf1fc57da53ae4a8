// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/cgroup"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/criu"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/netlock"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/pidfd"
	"github.com/kata-checkpoint/kata-checkpoint/internal/procfs"
)

// criuTimeout is how long a restarted agent waits for a CRIU whose agent has
// died to finish, before it kills it.
const criuTimeout = criu.StopGrace

// takeOver cleans up after an agent that has died: it kills what a restore in
// progress has restored, waits for the CRIU of a dump, which freezes its
// container again when it is done, removes the directories of operations, and has
// frozen containers thawed unless a shim claims them.
func (a *Agent) takeOver() error {
	if err := a.endRestores(); err != nil {
		return err
	}
	deadline := time.Now().Add(criuTimeout)
	for _, pid := range criu.Running() {
		if err := outlive(pid, deadline); err != nil {
			return err
		}
	}
	ops, err := filepath.Glob(filepath.Join(a.dir, "ops", "*"))
	for _, dir := range ops {
		err = errclass.Join(err, os.RemoveAll(dir))
	}
	if err != nil {
		return err
	}
	containers, err := a.containers()
	if err != nil {
		return err
	}
	for _, c := range containers {
		frozen, err := cgroup.Frozen(c.tree())
		frozen = err == nil && frozen
		if c.NetworkLocked {
			if err := a.takeOverLock(c, frozen); err != nil {
				log.L.WithError(err).WithField("container", c.ID).Warn("failed to unlock the network of a container whose agent has died")
			}
		}
		if frozen {
			log.L.WithField("container", c.ID).Warn("container was frozen by an agent that has died")
			a.leases.frozen(c.ID, c.Owner)
		}
	}
	return nil
}

// endRestores kills the processes of restores that were in progress, which nobody
// has checked. The shim has been told that they failed, by the end of its
// connection.
func (a *Agent) endRestores() error {
	containers, err := a.containers()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), cleanupTimeout)
	defer cancel()
	for _, c := range containers {
		if c.Restored == nil {
			err = errclass.Join(err, cgroup.Kill(ctx, filepath.Join(c.Cgroup, restoredCgroup)))
		}
	}
	if err != nil {
		return fmt.Errorf("kill what was being restored by an agent that has died: %w", err)
	}
	// CRIU waits for that agent's answer. It is not in their cgroup any more, but
	// has a namespace of it; that of a dump has none.
	for _, pid := range criu.Running() {
		if same, err := procfs.SameNamespace(os.Getpid(), pid, "cgroup"); err == nil && !same {
			if err := outlive(pid, time.Now()); err != nil {
				return err
			}
		}
	}
	return nil
}

// takeOverLock deals with the network lock that an operation left which was in
// progress when the agent died. No CRIU is at work any more. What is frozen is
// unlocked when it is thawed: its connections may have been dumped already.
func (a *Agent) takeOverLock(c *container, frozen bool) error {
	err := netlock.RemoveStale("")
	if !frozen {
		err = errclass.Join(err, a.unlockNetwork(context.Background(), c))
	}
	return err
}

// outlive waits until a process has exited, and kills it at the deadline.
func outlive(pid int, deadline time.Time) error {
	fd, err := pidfd.Open(pid)
	if errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	log.L.WithField("pid", pid).Warn("waiting for the CRIU of an agent that has died")
	exited, err := pidfd.Wait(fd, time.Until(deadline))
	if err != nil || exited {
		return err
	}
	log.L.WithField("pid", pid).Warn("killing the CRIU of an agent that has died")
	if err := pidfd.Kill(fd); err != nil {
		return err
	}
	if exited, err = pidfd.Wait(fd, criuTimeout); err == nil && !exited {
		err = fmt.Errorf("process %d, the CRIU of an agent that has died, does not exit", pid)
	}
	return err
}
