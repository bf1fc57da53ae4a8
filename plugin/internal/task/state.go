// SPDX-License-Identifier: Apache-2.0

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

// stateTimeout bounds Kata's part of State: after 2 s containerd reports the
// task's status as unknown (plugins/services/tasks/local.go).
const stateTimeout = 1500 * time.Millisecond

// runningTTL is how long a cached RUNNING state is served. An exit is reported
// on its own, as an event and as the answer to a Wait; the limit is for the
// case that neither arrives.
const runningTTL = 2 * time.Second

// report answers State from the cache while a container is running, which costs
// no second hop and cannot block, and during a Start in Kata. Otherwise it asks
// Kata, and falls back to the cache if Kata does not answer in time.
func (c *container) report(ctx context.Context, r *task.StateRequest) (*task.StateResponse, error) {
	if r.ExecID == "" {
		c.noteLook()
		if resp := c.current().response(); resp != nil {
			return resp, nil
		}
		if last := c.cachedRunning(); last != nil {
			return c.overlayStatus(last), nil
		}
		// Kata's Go shim answers nobody during a Start.
		if last, ok := c.stateCache.Load(""); ok && c.initStart.Load().inFlight() {
			return last.(*task.StateResponse), nil
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
	case errors.Is(kctx.Err(), context.DeadlineExceeded), r.ExecID == "" && c.abandoning.Load():
		if resp := c.current().response(); resp != nil && r.ExecID == "" {
			return resp, nil // it was abandoned meanwhile
		}
		last, ok := c.stateCache.Load(r.ExecID)
		if !ok {
			return nil, err
		}
		resp = last.(*task.StateResponse)
		log.G(ctx).WithError(err).WithField("container", c.id).Warn("Kata did not answer State, serving the cached state")
	default:
		return nil, err
	}
	return c.overlayStatus(resp), nil
}

// recordStatus records the status of init that Kata has reported.
func (c *container) recordStatus(status tasktypes.Status) {
	switch status {
	case statusRunning:
		now := time.Now() // with the monotonic clock, which nobody sets
		c.runningAt.Store(&now)
	case statusStopped:
		if _, ending := c.current().(endingState); !ending { // which reports the exit
			c.stopped()
		}
	}
}

// cachedRunning returns the cached state of a managed container that is
// running, or nil if there is none that is fresh enough.
func (c *container) cachedRunning() *task.StateResponse {
	at := c.runningAt.Load()
	if at == nil || !c.managed() || time.Since(*at) > runningTTL {
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

// overlayStatus adds to Kata's response what Kata does not know: that this shim
// shows the container and its execs as paused, that the process that runs while a
// restore is in progress is the placeholder, and that what a failed Start has left is
// being ended.
func (c *container) overlayStatus(resp *task.StateResponse) *task.StateResponse {
	if resp.GetStatus() != statusRunning {
		return resp
	}
	st := c.current()
	_, created := st.(createdState)
	_, ending := st.(endingState)
	var status tasktypes.Status
	switch {
	case st.paused():
		status = statusPaused
	case created && c.source != nil, ending:
		status = statusCreated
	default:
		return resp
	}
	shown := proto.Clone(resp).(*task.StateResponse)
	shown.Status = status
	return shown
}
