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

// runningTTL is how long Kata's word that a container runs is taken without
// asking again. That it has ended comes by itself, as an event and as the
// answer to a Wait; this is for the case that neither arrived.
const runningTTL = 2 * time.Second

// report answers for a running container from what Kata said last, so that it
// costs no second hop and waits for nobody; else it asks Kata, and takes the
// last answer when that takes too long.
func (c *container) report(ctx context.Context, r *task.StateRequest) (*task.StateResponse, error) {
	if r.ExecID == "" {
		if resp := c.current().response(); resp != nil {
			return resp, nil
		}
		if last := c.cachedRunning(); last != nil {
			return c.overlayStatus(last), nil
		}
	}
	kctx, cancel := context.WithTimeout(ctx, stateTimeout)
	defer cancel()
	resp := &task.StateResponse{}
	err := c.s.forward(kctx, "State", r, resp)
	switch {
	case err == nil:
		c.stateCache.Store(r.ExecID, resp)
		if r.ExecID == "" {
			c.recordStatus(resp.GetStatus())
		}
	case errors.Is(kctx.Err(), context.DeadlineExceeded):
		last, ok := c.stateCache.Load(r.ExecID)
		if !ok {
			return nil, err
		}
		resp = last.(*task.StateResponse)
		log.G(ctx).WithField("container", c.id).Warn("Kata does not answer State in time: the last known state is shown")
	default:
		return nil, err
	}
	return c.overlayStatus(resp), nil
}

// recordStatus remembers what Kata said of the container's first process.
func (c *container) recordStatus(status tasktypes.Status) {
	switch status {
	case statusRunning:
		c.runningAt.Store(time.Now().UnixNano())
	case statusStopped:
		c.stopped()
	}
}

// cachedRunning returns Kata's last answer for a container that the agent knows
// and that runs, as far as anybody has heard.
func (c *container) cachedRunning() *task.StateResponse {
	if !c.managed() || time.Since(time.Unix(0, c.runningAt.Load())) > runningTTL {
		return nil
	}
	last, ok := c.stateCache.Load("")
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
func (c *container) overlayStatus(resp *task.StateResponse) *task.StateResponse {
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
