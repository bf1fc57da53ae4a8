// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"syscall"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
)

// restoredExec is an exec into a restored container. Kata starts the exec
// helper in the placeholder's namespaces, and the agent starts the requested
// process in the restored ones, with the helper's stdio.
type restoredExec struct {
	token string
	// process is the OCI process that the caller has requested.
	process []byte
}

// exec adds an exec to a container, without starting it.
func (c *container) exec(ctx context.Context, r *task.ExecProcessRequest) (*emptypb.Empty, error) {
	if c.source != nil && !c.restored() {
		// Kata would start it in the placeholder's namespaces, where no process of
		// the container is.
		return nil, errclass.Precondition(errcode.Restoring, "exec %s: container %s is being restored: repeat it once the container is running", r.ExecID, c.id)
	}
	if c.source == nil {
		resp, err := c.s.forwardEmpty(ctx, "Exec", r)
		if err == nil {
			c.starts.expect(r.ExecID)
		}
		return resp, err
	}
	e, helper, err := rewriteExec(r)
	if err != nil {
		return nil, fmt.Errorf("exec %s in container %s: %w", r.ExecID, r.ID, err)
	}
	resp, err := c.s.forwardEmpty(ctx, "Exec", helper)
	if err == nil {
		c.execs.Store(r.ExecID, e)
		c.starts.expect(r.ExecID)
	}
	return resp, err
}

// rewriteExec replaces the requested process by the exec helper.
func rewriteExec(r *task.ExecProcessRequest) (*restoredExec, *task.ExecProcessRequest, error) {
	var process specs.Process
	if err := json.Unmarshal(r.GetSpec().GetValue(), &process); err != nil {
		return nil, nil, errclass.Invalid(errcode.ExecInvalid, "process: %w", err)
	}
	e := &restoredExec{token: rand.Text(), process: r.GetSpec().GetValue()}
	data, err := json.Marshal(specs.Process{
		Terminal:    process.Terminal,
		ConsoleSize: process.ConsoleSize,
		Args:        []string{api.HelperPath, api.ExecMode, e.token},
		Cwd:         "/",
	})
	if err != nil {
		return nil, nil, fmt.Errorf("encode the process of the exec helper: %w", err)
	}
	helper := proto.Clone(r).(*task.ExecProcessRequest)
	helper.Spec = &anypb.Any{TypeUrl: r.GetSpec().GetTypeUrl(), Value: data}
	return e, helper, nil
}

// startExec starts an exec, which waits while the container is frozen.
func (c *container) startExec(ctx context.Context, r *task.StartRequest) (_ *task.StartResponse, err error) {
	defer func() { c.starts.done(r.ExecID, err == nil) }()
	if err := c.execGate.enter(ctx, c.s.cfg.ExecWaitTimeout); err != nil {
		return nil, fmt.Errorf("exec %s in container %s: %w", r.ExecID, c.id, err)
	}
	defer c.execGate.leave()
	resp := &task.StartResponse{}
	e, ok := c.execs.Load(r.ExecID)
	if !ok {
		return resp, c.s.forward(ctx, "Start", r, resp)
	}
	if err := c.startInRestored(ctx, r, resp, e.(*restoredExec)); err != nil {
		return nil, err
	}
	return resp, nil
}

// startInRestored has Kata start the exec helper and the agent the process that
// the helper stands for. The agent is called first and waits for the helper, so
// that its preparations cost no time.
func (c *container) startInRestored(ctx context.Context, r *task.StartRequest, resp *task.StartResponse, e *restoredExec) error {
	actx, cancel := context.WithCancel(ctx)
	defer cancel()
	entered := make(chan error, 1)
	go func() { entered <- c.enterRestored(actx, e) }()
	if err := c.s.forward(ctx, "Start", r, resp); err != nil {
		cancel()  // there is no helper to wait for
		<-entered //nolint:errcheck // canceled
		return err
	}
	err := <-entered
	if err == nil {
		return nil
	}
	uctx, stop := cleanupContext(ctx)
	defer stop()
	if kerr := c.stopHelper(uctx, r.ExecID); kerr != nil {
		err = errclass.Join(err, kerr)
	}
	return fmt.Errorf("exec %s in container %s: %w", r.ExecID, c.id, err)
}

// enterRestored has the agent start the process that the exec helper stands
// for.
func (c *container) enterRestored(ctx context.Context, e *restoredExec) error {
	return c.s.agent.Call(ctx, func(ctx context.Context, a api.AgentService) error {
		_, err := a.Exec(ctx, &api.ExecRequest{ContainerId: c.id, HelperToken: e.token, Process: e.process, Token: c.exchange.token})
		return err
	})
}

// stopHelper kills an exec helper and waits until Kata reports it as stopped:
// the engine deletes the exec next, which fails while it is running.
func (c *container) stopHelper(ctx context.Context, id string) error {
	err := c.s.down.kill(ctx, &task.KillRequest{ID: c.id, ExecID: id, Signal: uint32(syscall.SIGKILL)})
	if err != nil && !isGone(err) {
		return err
	}
	for {
		st := &task.StateResponse{}
		err := c.s.down.callNative(ctx, "State", &task.StateRequest{ID: c.id, ExecID: id}, st)
		if isGone(err) || err == nil && st.GetStatus() == statusStopped {
			return nil
		}
		if err != nil {
			return err
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
