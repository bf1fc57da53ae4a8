// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"

	"github.com/containerd/containerd/api/runtime/task/v2"
	tasktypes "github.com/containerd/containerd/api/types/task"
)

// connect, like pids, is answered here while Kata creates the container, with
// the PID of this process. When containerd starts it makes both calls to each
// shim that it finds, and deletes one that does not answer within 5 s or has no
// process, with the VM that Kata is booting (core/runtime/v2/shim_load.go).
// Kata's Go shim answers no call before its Create has ended.
func (c *container) connect(ctx context.Context, r *task.ConnectRequest) (*task.ConnectResponse, error) {
	if s, ok := c.current().(creatingState); ok {
		return &task.ConnectResponse{ShimPid: s.answer.GetPid(), TaskPid: s.answer.GetPid()}, nil
	}
	resp := &task.ConnectResponse{}
	return resp, c.s.forward(ctx, "Connect", r, resp)
}

// pids lists a container's processes on the host, of which Kata has one; see
// [container.connect].
func (c *container) pids(ctx context.Context, r *task.PidsRequest) (*task.PidsResponse, error) {
	if s, ok := c.current().(creatingState); ok {
		return &task.PidsResponse{Processes: []*tasktypes.ProcessInfo{{Pid: s.answer.GetPid()}}}, nil
	}
	resp := &task.PidsResponse{}
	return resp, c.s.forward(ctx, "Pids", r, resp)
}
