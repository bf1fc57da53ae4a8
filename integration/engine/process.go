// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// Command describes a process to run in a task.
type Command struct {
	ID   string
	Args []string
	// Stdin is closed for the process at its end.
	Stdin    io.Reader
	Terminal bool
	// Change changes the process further; it starts as the container's, with
	// other arguments.
	Change func(*specs.Process)
}

// Process is a command that runs in a task.
type Process struct {
	client.Process
	Stdout, Stderr *Output
	exited         <-chan client.ExitStatus
}

// Add adds a process to a task. Start starts it.
func (e *Engine) Add(ctx context.Context, task client.Task, c Command) (*Process, error) {
	spec, err := task.Spec(ctx)
	if err != nil {
		return nil, fmt.Errorf("exec %s in %s: %w", c.ID, task.ID(), err)
	}
	process := *spec.Process
	process.Args, process.Terminal = c.Args, c.Terminal
	if c.Change != nil {
		c.Change(&process)
	}
	p := &Process{Stdout: NewOutput(), Stderr: NewOutput()}
	var stdin *closing
	streams := Streams{Stderr: p.Stderr, Terminal: c.Terminal}
	if c.Stdin != nil {
		stdin = &closing{Reader: c.Stdin, ready: make(chan struct{})}
		streams.Stdin = stdin
	}
	p.Process, err = task.Exec(ctx, c.ID, &process, e.With(streams).streams(p.Stdout))
	if err != nil {
		return nil, fmt.Errorf("exec %s in %s: %w", c.ID, task.ID(), err)
	}
	if stdin != nil {
		stdin.close = func() { _ = p.CloseIO(context.WithoutCancel(ctx), client.WithStdinCloser) }
		close(stdin.ready)
	}
	if p.exited, err = p.Wait(context.WithoutCancel(ctx)); err != nil {
		_, deleted := p.Delete(ctx, client.WithProcessKill)
		return nil, errors.Join(fmt.Errorf("exec %s in %s: %w", c.ID, task.ID(), err), deleted)
	}
	return p, nil
}

// Exec starts a command in a task.
func (e *Engine) Exec(ctx context.Context, task client.Task, c Command) (*Process, error) {
	p, err := e.Add(ctx, task, c)
	if err != nil {
		return nil, err
	}
	if err := p.Start(ctx); err != nil {
		_, deleted := p.Delete(ctx, client.WithProcessKill)
		if errdefs.IsNotFound(deleted) {
			deleted = nil
		}
		return nil, errors.Join(fmt.Errorf("exec %s in %s: %w", c.ID, task.ID(), err), deleted)
	}
	return p, nil
}

// Exit waits until the process has exited, deletes it and returns its exit
// status. All its output has arrived by then.
func (p *Process) Exit(ctx context.Context) (uint32, error) {
	select {
	case status := <-p.exited:
		code, _, err := status.Result()
		if _, deleted := p.Delete(ctx); deleted != nil && !errdefs.IsNotFound(deleted) {
			err = errors.Join(err, deleted)
		}
		return code, err
	case <-ctx.Done():
		return 0, fmt.Errorf("wait for exec %s to exit: %w", p.ID(), ctx.Err())
	}
}

// closing is a stdin that closes the process's stdin at its end. Containerd's
// client leaves that to its caller, because shims hold the pipe open.
type closing struct {
	io.Reader
	ready chan struct{}
	close func()
	once  sync.Once
}

func (c *closing) Read(b []byte) (int, error) {
	n, err := c.Reader.Read(b)
	if err != nil {
		c.once.Do(func() {
			<-c.ready
			c.close()
		})
	}
	return n, err
}
