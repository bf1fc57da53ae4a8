// Package engine does with containerd what container engines do with it: it creates containers, runs, pauses, checkpoints and restores them by
// the calls, in the order and with the options of ctr, nerdctl and docker. The scenarios, the benchmarks and the demonstration call it.
//
// It knows nothing of the runtime below but its name.
package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// Engine works with one containerd.
type Engine struct {
	Client  *client.Client
	Runtime string
	// FIFOs is the directory for the named pipes of the containers' streams.
	FIFOs string
	// Streams are those of the containers that are started, beside their stdout.
	Streams Streams
}

// Streams are what a container is connected to.
type Streams struct {
	Stdin    io.Reader
	Stderr   io.Writer
	Terminal bool
}

// With gives an engine that connects containers to other streams.
func (e *Engine) With(s Streams) *Engine {
	other := *e
	other.Streams = s
	return &other
}

// Container says what container to create.
type Container struct {
	ID    string
	Image string
	Args  []string
	// Mounts are added to those that every container has.
	Mounts      []specs.Mount
	Hooks       *specs.Hooks
	Annotations map[string]string
	// Network is the path of a network namespace; empty: a new one.
	Network string
	// Spec changes what else there is in the container's specification.
	Spec []oci.SpecOpts
	// RuntimeOptions are what an operator configures for the runtime, such as the path of Kata's configuration.
	RuntimeOptions typeurl.Any
}

// Create makes the container and its writable layer. Nothing runs yet.
func (e *Engine) Create(ctx context.Context, c Container) (client.Container, error) {
	image, err := e.Client.GetImage(ctx, c.Image)
	if err != nil {
		return nil, fmt.Errorf("create %s: %w", c.ID, err)
	}
	spec := []oci.SpecOpts{oci.WithImageConfig(image), oci.WithMounts(c.Mounts), oci.WithAnnotations(c.Annotations)}
	if len(c.Args) > 0 {
		spec = append(spec, oci.WithProcessArgs(c.Args...))
	}
	if c.Hooks != nil {
		spec = append(spec, func(_ context.Context, _ oci.Client, _ *containers.Container, s *oci.Spec) error {
			s.Hooks = c.Hooks
			return nil
		})
	}
	if c.Network != "" {
		spec = append(spec, oci.WithLinuxNamespace(specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: c.Network}))
	}
	if e.Streams.Terminal {
		spec = append(spec, oci.WithTTY)
	}
	spec = append(spec, c.Spec...)
	container, err := e.Client.NewContainer(ctx, c.ID, client.WithImage(image), client.WithNewSnapshot(c.ID, image),
		client.WithRuntime(e.Runtime, c.RuntimeOptions), client.WithNewSpec(spec...))
	if err != nil {
		return nil, fmt.Errorf("create %s: %w", c.ID, err)
	}
	return container, nil
}

// Run is a task that was started, with its output.
type Run struct {
	client.Task
	Output *Output
	exited <-chan client.ExitStatus
}

// Start runs the container. Options make it a restore.
func (e *Engine) Start(ctx context.Context, container client.Container, opts ...client.NewTaskOpts) (*Run, error) {
	if err := os.MkdirAll(e.FIFOs, 0o700); err != nil {
		return nil, fmt.Errorf("start %s: %w", container.ID(), err)
	}
	run := &Run{Output: NewOutput()}
	task, err := container.NewTask(ctx, e.streams(run.Output), opts...)
	if err != nil {
		return nil, fmt.Errorf("create task %s: %w", container.ID(), err)
	}
	run.Task = task
	// Before Start, as every engine does: an exit cannot be missed.
	if run.exited, err = task.Wait(context.WithoutCancel(ctx)); err == nil {
		err = task.Start(ctx)
	}
	if err != nil {
		_, deleted := task.Delete(ctx, client.WithProcessKill)
		return nil, errors.Join(fmt.Errorf("start task %s: %w", container.ID(), err), deleted)
	}
	return run, nil
}

func (e *Engine) streams(stdout io.Writer) cio.Creator {
	stderr := e.Streams.Stderr
	if stderr == nil {
		stderr = io.Discard
	}
	opts := []cio.Opt{cio.WithStreams(e.Streams.Stdin, stdout, stderr), cio.WithFIFODir(e.FIFOs)}
	if e.Streams.Terminal {
		opts = append(opts, cio.WithTerminal)
	}
	return cio.NewCreator(opts...)
}

// Reconnect is for after containerd was started again: the engine's client, and all tasks and containers that it has given, work on.
// A wait of before has ended with containerd, see [Run.Rejoin], and so has a collection of events, see [Events.Rejoin].
func (e *Engine) Reconnect() error {
	if err := e.Client.Reconnect(); err != nil {
		return fmt.Errorf("reconnect: %w", err)
	}
	return nil
}

// Rejoin waits for the task's end once more, after containerd was started again. What the task prints has come all the time.
func (r *Run) Rejoin(ctx context.Context) (err error) {
	if r.exited, err = r.Wait(context.WithoutCancel(ctx)); err != nil {
		return fmt.Errorf("wait for %s: %w", r.ID(), err)
	}
	return nil
}

// Exit waits until the task has ended and gives its exit status.
func (r *Run) Exit(ctx context.Context) (uint32, error) {
	select {
	case status := <-r.exited:
		code, _, err := status.Result()
		return code, err
	case <-ctx.Done():
		return 0, fmt.Errorf("wait for the end of %s: %w", r.ID(), ctx.Err())
	}
}

// EndTask kills the container's task, if there is one, and deletes it. The container and its files stay.
func (e *Engine) EndTask(ctx context.Context, container client.Container) error {
	task, err := container.Task(ctx, nil)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("end %s: %w", container.ID(), err)
	}
	exited, err := task.Wait(ctx)
	if err != nil {
		return fmt.Errorf("end %s: %w", container.ID(), err)
	}
	if err := task.Kill(ctx, syscall.SIGKILL, client.WithKillAll); err != nil && !errdefs.IsNotFound(err) && !errdefs.IsFailedPrecondition(err) {
		return fmt.Errorf("end %s: %w", container.ID(), err)
	}
	select {
	case <-exited:
	case <-ctx.Done():
		return fmt.Errorf("end %s: %w", container.ID(), ctx.Err())
	}
	if _, err := task.Delete(ctx); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("end %s: %w", container.ID(), err)
	}
	return nil
}

// Remove ends the container, if it runs, and removes it with its writable layer. One that does not exist is no error.
func (e *Engine) Remove(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	container, err := e.Client.LoadContainer(ctx, id)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove %s: %w", id, err)
	}
	if err := e.EndTask(ctx, container); err != nil {
		return fmt.Errorf("remove %s: %w", id, err)
	}
	if err := container.Delete(ctx, client.WithSnapshotCleanup); err != nil {
		return fmt.Errorf("remove %s: %w", id, err)
	}
	return nil
}
