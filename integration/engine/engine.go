// SPDX-License-Identifier: Apache-2.0

// Package engine uses containerd as container engines do: it creates, runs,
// pauses, checkpoints and restores containers with the calls, in the order and
// with the options of ctr, nerdctl and docker. The scenarios and the benchmarks
// call it.
//
// It knows nothing about the runtime except its name.
package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

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
	// FIFOs is the directory of the named pipes for the containers' streams.
	FIFOs string
	// Streams are the containers' streams in addition to stdout.
	Streams Streams
}

// Streams are what a container is connected to.
type Streams struct {
	Stdin    io.Reader
	Stderr   io.Writer
	Terminal bool
}

// With returns an engine that connects containers to other streams.
func (e *Engine) With(s Streams) *Engine {
	other := *e
	other.Streams = s
	return &other
}

// Container describes a container to create.
type Container struct {
	ID    string
	Image string
	Args  []string
	// Mounts are added to the default ones.
	Mounts      []specs.Mount
	Hooks       *specs.Hooks
	Annotations map[string]string
	// Network is the path of a network namespace. If it is empty, the container
	// gets a new one.
	Network string
	// Spec changes the container's OCI spec further.
	Spec []oci.SpecOpts
	// RuntimeOptions are the runtime options that an operator configures, such
	// as the path of Kata's configuration.
	RuntimeOptions typeurl.Any
}

// Create creates the container and its writable layer without a task.
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

// Run is a started task with its output.
type Run struct {
	client.Task
	Output *Output
	exited <-chan client.ExitStatus
}

// Start runs the container. Options make it a restore.
func (e *Engine) Start(ctx context.Context, container client.Container, opts ...client.NewTaskOpts) (*Run, error) {
	run, err := e.prepare(ctx, container, opts...)
	if run == nil {
		return nil, err
	}
	if err == nil {
		err = run.Start(ctx)
	}
	if err != nil {
		_, deleted := run.Delete(ctx, client.WithProcessKill)
		return nil, errors.Join(fmt.Errorf("start task %s: %w", container.ID(), err), deleted)
	}
	return run, nil
}

// prepare creates the container's task. If it returns an error with the task, the
// task is to be deleted.
func (e *Engine) prepare(ctx context.Context, container client.Container, opts ...client.NewTaskOpts) (*Run, error) {
	if err := os.MkdirAll(e.FIFOs, 0o700); err != nil {
		return nil, fmt.Errorf("start %s: %w", container.ID(), err)
	}
	run := &Run{Output: NewOutput()}
	task, err := container.NewTask(ctx, e.streams(run.Output), opts...)
	if err != nil {
		return nil, fmt.Errorf("create task %s: %w", container.ID(), err)
	}
	run.Task = task
	// Before Start, as every engine does, so that no exit is missed.
	run.exited, err = task.Wait(context.WithoutCancel(ctx))
	return run, err
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

// Reconnect reconnects the engine's client after a restart of containerd; tasks
// and containers that it returned stay valid. Waits end with containerd, see
// [Run.Rejoin], and so do event collections, see [Events.Rejoin].
func (e *Engine) Reconnect() error {
	if err := e.Client.Reconnect(); err != nil {
		return fmt.Errorf("reconnect: %w", err)
	}
	return nil
}

// Rejoin waits for the task's exit again after a restart of containerd. The
// task's output is not interrupted by one.
func (r *Run) Rejoin(ctx context.Context) (err error) {
	if r.exited, err = r.Wait(context.WithoutCancel(ctx)); err != nil {
		return fmt.Errorf("wait for %s: %w", r.ID(), err)
	}
	return nil
}

// Exit waits until the task has exited and returns its exit status.
func (r *Run) Exit(ctx context.Context) (uint32, error) {
	select {
	case status := <-r.exited:
		code, _, err := status.Result()
		return code, err
	case <-ctx.Done():
		return 0, fmt.Errorf("wait for %s to exit: %w", r.ID(), ctx.Err())
	}
}

// EndTask kills the container's task, if there is one, and deletes it. The
// container and its files stay.
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

// Remove removes the container with its writable layer, killing its task first.
// It is no error if the container does not exist.
func (e *Engine) Remove(ctx context.Context, id string) error {
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
