package task

import (
	"context"

	"github.com/containerd/containerd/api/runtime/task/v2"
	tasktypes "github.com/containerd/containerd/api/types/task"
)

// connect and pids are what a containerd that starts asks of each shim that it
// finds; one that does not answer within 5 s it has deleted, with the VM that
// Kata boots meanwhile (core/runtime/v2/shim_load.go). Kata's Go shim answers
// nobody before its Create has ended. Its place is taken by this process until
// then: a container without one is not kept either.
func (c *container) connect(ctx context.Context, r *task.ConnectRequest) (*task.ConnectResponse, error) {
	if s, ok := c.current().(creatingState); ok {
		return &task.ConnectResponse{ShimPid: s.answer.GetPid(), TaskPid: s.answer.GetPid()}, nil
	}
	resp := &task.ConnectResponse{}
	return resp, c.s.forward(ctx, "Connect", r, resp)
}

// pids lists a container's processes on the host, of which Kata has one.
func (c *container) pids(ctx context.Context, r *task.PidsRequest) (*task.PidsResponse, error) {
	if s, ok := c.current().(creatingState); ok {
		return &task.PidsResponse{Processes: []*tasktypes.ProcessInfo{{Pid: s.answer.GetPid()}}}, nil
	}
	resp := &task.PidsResponse{}
	return resp, c.s.forward(ctx, "Pids", r, resp)
}
