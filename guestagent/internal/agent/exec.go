// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"

	"github.com/containerd/log"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/criu"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/enter"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/exechelper"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
)

// Exec implements the service.
func (a *Agent) Exec(ctx context.Context, r *api.ExecRequest) (*api.ExecResponse, error) {
	c, err := a.running(r.GetContainerId())
	if err != nil {
		return nil, errclass.ToRPC(err)
	}
	if c.Restored == nil {
		return nil, errclass.ToRPC(errclass.Precondition(errcode.NotRestored, "container %s is not a restored one", c.ID))
	}
	pid, err := a.exec(ctx, c, r)
	if err != nil {
		return nil, errclass.ToRPC(err)
	}
	return &api.ExecResponse{Pid: int32(pid)}, nil //nolint:gosec // a pid
}

// exec prepares the process while Kata starts the helper, and starts it on the
// helper's stdio.
func (a *Agent) exec(ctx context.Context, c *container, r *api.ExecRequest) (int, error) {
	if _, err := a.criu.version(); err != nil { // loads the program that enters
		return 0, err
	}
	process, err := enter.Prepare(enter.Request{Target: c.Restored.PID, Cgroup: c.tree(), Process: r.GetProcess()})
	if err != nil {
		return 0, err
	}
	defer process.Close()
	placeholder := exechelper.Placeholder{PID: c.Init.PID, Cgroup: c.Cgroup, File: c.Helper, Alive: c.root().alive}
	h, err := exechelper.Find(ctx, placeholder, r.GetHelperToken())
	if err != nil {
		return 0, err
	}
	// Kata applies the container's seccomp profile to the helper only.
	filters, err := h.Filters()
	if err != nil {
		return 0, errclass.Join(err, h.Kill())
	}
	pid, err := process.Run(ctx, criu.Helper, h.Stdio, filters)
	if err != nil {
		return 0, errclass.Join(err, h.Kill())
	}
	forget, err := a.execs.add(r.GetHelperToken(), pid)
	if err != nil {
		log.G(ctx).WithError(err).WithField("pid", pid).Warn("a process of an exec cannot be stopped by a signal")
	}
	go func() {
		defer forget()
		h.Attend(pid)
	}()
	return pid, nil
}
