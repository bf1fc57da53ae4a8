package task

import (
	"context"
	"errors"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v2"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/log"
	"google.golang.org/protobuf/proto"
)

const (
	statusCreated = tasktypes.Status_CREATED
	statusRunning = tasktypes.Status_RUNNING
	statusStopped = tasktypes.Status_STOPPED
	statusPaused  = tasktypes.Status_PAUSED
)

// stateTimeout bounds Kata's part of State: containerd gives a shim 2 s
// (plugins/services/tasks/local.go) and shows the task as unknown then.
const stateTimeout = 1500 * time.Millisecond

// runningFor is how long Kata's word that a container runs is taken without
// asking again. That it has ended comes by itself, as an event and as the
// answer to a Wait; this is for the case that neither arrived.
const runningFor = 2 * time.Second

// State answers for a running container from what Kata said last, so that it
// costs no second hop and waits for nobody; else it asks Kata, and takes the
// last answer when that takes too long.
func (s *Service) State(ctx context.Context, r *task.StateRequest) (*task.StateResponse, error) {
	c := s.container(r.ID)
	if c == nil {
		resp := &task.StateResponse{}
		return resp, s.pass(ctx, "State", r, resp)
	}
	if created := c.creating.Load(); created != nil && r.ExecID == "" {
		return created, nil
	}
	if a := c.abandoned.Load(); a != nil && r.ExecID == "" {
		return a.state(c), nil
	}
	if r.ExecID == "" {
		if last := c.lastRunning(); last != nil {
			return c.shown(last), nil
		}
	}
	kctx, cancel := context.WithTimeout(ctx, stateTimeout)
	defer cancel()
	resp := &task.StateResponse{}
	err := s.pass(kctx, "State", r, resp)
	switch {
	case err == nil:
		c.answers.Store(r.ExecID, resp)
		if r.ExecID == "" {
			c.noteStatus(resp.GetStatus())
		}
	case errors.Is(kctx.Err(), context.DeadlineExceeded):
		last, ok := c.answers.Load(r.ExecID)
		if !ok {
			return nil, err
		}
		resp = last.(*task.StateResponse)
		log.G(ctx).WithField("container", c.id).Warn("Kata does not answer State in time: the last known state is shown")
	default:
		return nil, err
	}
	return c.shown(resp), nil
}

// Connect and Pids are what a containerd that starts asks of each shim that it
// finds; one that does not answer within 5 s it has deleted, with the VM that
// Kata boots meanwhile (core/runtime/v2/shim_load.go). Kata's Go shim answers
// nobody before its Create has ended. Its place is taken by this process until
// then: a container without one is not kept either.
func (s *Service) Connect(ctx context.Context, r *task.ConnectRequest) (*task.ConnectResponse, error) {
	if c := s.container(r.ID); c != nil {
		if created := c.creating.Load(); created != nil {
			return &task.ConnectResponse{ShimPid: created.GetPid(), TaskPid: created.GetPid()}, nil
		}
	}
	resp := &task.ConnectResponse{}
	return resp, s.pass(ctx, "Connect", r, resp)
}

// Pids lists a container's processes on the host, of which Kata has one.
func (s *Service) Pids(ctx context.Context, r *task.PidsRequest) (*task.PidsResponse, error) {
	if c := s.container(r.ID); c != nil {
		if created := c.creating.Load(); created != nil {
			return &task.PidsResponse{Processes: []*tasktypes.ProcessInfo{{Pid: created.GetPid()}}}, nil
		}
	}
	resp := &task.PidsResponse{}
	return resp, s.pass(ctx, "Pids", r, resp)
}

// noteStatus remembers what Kata said of the container's first process.
func (c *container) noteStatus(status tasktypes.Status) {
	switch status {
	case statusRunning:
		c.runningAt.Store(time.Now().UnixNano())
	case statusStopped:
		c.stopped()
	}
}

// lastRunning returns Kata's last answer for a container that the agent knows
// and that runs, as far as anybody has heard.
func (c *container) lastRunning() *task.StateResponse {
	if !c.managed() || time.Since(time.Unix(0, c.runningAt.Load())) > runningFor {
		return nil
	}
	last, ok := c.answers.Load("")
	if !ok {
		return nil
	}
	resp := last.(*task.StateResponse)
	if resp.GetStatus() != statusRunning {
		return nil
	}
	return resp
}

// shown is Kata's answer with what Kata does not know: that we have frozen the
// container, its execs too, and that what runs is a placeholder as long as a
// restore is under way or is undone.
func (c *container) shown(resp *task.StateResponse) *task.StateResponse {
	if resp.GetStatus() != statusRunning {
		return resp
	}
	st := c.current()
	_, created := st.(createdState)
	var status tasktypes.Status
	switch {
	case st.frozen():
		status = statusPaused
	case created && c.source != nil:
		status = statusCreated
	default:
		return resp
	}
	shown := proto.Clone(resp).(*task.StateResponse)
	shown.Status = status
	return shown
}
