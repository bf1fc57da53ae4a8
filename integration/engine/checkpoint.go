// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/api/types"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// checkpointLabel marks the images that containerd's client creates of
// checkpoints.
const checkpointLabel = "containerd.io/checkpoint"

// CheckpointTo writes the image set to an existing directory, as `ctr task
// checkpoint --image-path DIR [--exit]` does: the client pauses the task unless
// it is paused, requests the checkpoint with options, and resumes it.
func (e *Engine) CheckpointTo(ctx context.Context, task client.Task, dir string, exit bool) error {
	return e.CheckpointWith(ctx, task, dir, &runcoptions.CheckpointOptions{Exit: exit})
}

// CheckpointWith is CheckpointTo with other options.
func (e *Engine) CheckpointWith(ctx context.Context, task client.Task, dir string, options *runcoptions.CheckpointOptions) error {
	options.ImagePath = dir
	name := "checkpoint/" + task.ID() + ":" + filepath.Base(dir)
	_, err := task.Checkpoint(ctx, client.WithCheckpointName(name), func(i *client.CheckpointTaskInfo) error {
		i.Options = options
		return nil
	})
	if err != nil {
		return fmt.Errorf("checkpoint %s: %w", task.ID(), err)
	}
	// For runtimes other than runc the client also creates an image of the
	// writable layer, which nothing here needs.
	return e.RemoveCheckpoints(ctx)
}

// CheckpointByDefault lets containerd store the image set and unpacks it to a
// directory, as `nerdctl checkpoint create` and docker do. The runtime gets no
// options and decides on its own whether the container is stopped.
func (e *Engine) CheckpointByDefault(ctx context.Context, task client.Task, dir string) error {
	image, err := task.Checkpoint(ctx)
	if err != nil {
		return fmt.Errorf("checkpoint %s: %w", task.ID(), err)
	}
	if err := e.unpack(ctx, image, dir); err != nil {
		return fmt.Errorf("checkpoint %s: %w", task.ID(), err)
	}
	return e.RemoveCheckpoints(ctx)
}

// unpack writes the image set of a checkpoint's image to a directory.
func (e *Engine) unpack(ctx context.Context, image client.Image, dir string) error {
	data, err := content.ReadBlob(ctx, e.Client.ContentStore(), image.Target())
	if err != nil {
		return err
	}
	var index ocispec.Index
	if err := json.Unmarshal(data, &index); err != nil {
		return err
	}
	checkpoint, err := client.GetIndexByMediaType(&index, images.MediaTypeContainerd1Checkpoint)
	if err != nil {
		return err
	}
	reader, err := e.Client.ContentStore().ReaderAt(ctx, *checkpoint)
	if err != nil {
		return err
	}
	defer reader.Close()
	_, err = archive.Apply(ctx, dir, content.NewReader(reader))
	return err
}

// RemoveCheckpoints removes the images that checkpoints left in containerd.
func (e *Engine) RemoveCheckpoints(ctx context.Context) error {
	list, err := e.Client.ImageService().List(ctx, fmt.Sprintf("labels.%q", checkpointLabel))
	if err != nil {
		return fmt.Errorf("remove checkpoints: %w", err)
	}
	for _, image := range list {
		err = errors.Join(err, e.Client.ImageService().Delete(ctx, image.Name, images.SynchronousDelete()))
	}
	if err != nil {
		return fmt.Errorf("remove checkpoints: %w", err)
	}
	return nil
}

// Commit creates an image of the container's memory, its writable layer and its
// configuration, all of one instant, as `ctr container checkpoint --task --rw
// --image ID REFERENCE` does. The container keeps running.
func (e *Engine) Commit(ctx context.Context, container client.Container, reference string) (client.Image, error) {
	task, err := container.Task(ctx, nil)
	if err != nil {
		return nil, fmt.Errorf("checkpoint %s: %w", container.ID(), err)
	}
	if err := task.Pause(ctx); err != nil {
		return nil, fmt.Errorf("checkpoint %s: %w", container.ID(), err)
	}
	image, err := container.Checkpoint(ctx, reference, client.WithCheckpointRuntime, client.WithCheckpointImage, client.WithCheckpointRW,
		client.WithCheckpointTask)
	if err := errors.Join(err, task.Resume(ctx)); err != nil {
		return nil, fmt.Errorf("checkpoint %s: %w", container.ID(), err)
	}
	return image, nil
}

// RestoreImage creates a container from an image made by Commit and restores
// its processes: `ctr container restore --rw --live ID REFERENCE`.
func (e *Engine) RestoreImage(ctx context.Context, id string, image client.Image) (*Run, error) {
	container, err := e.Client.Restore(ctx, id, image, client.WithRestoreImage, client.WithRestoreSpec, client.WithRestoreRuntime,
		client.WithRestoreRW)
	if err != nil {
		return nil, fmt.Errorf("restore %s: %w", id, err)
	}
	return e.Start(ctx, container, client.WithTaskCheckpoint(image))
}

// Restore starts the container from the image set in a directory, as `nerdctl
// start --checkpoint` and `docker start --checkpoint` do: the directory goes
// into containerd's content store as an archive, which containerd unpacks for
// the runtime.
func (e *Engine) Restore(ctx context.Context, container client.Container, dir string) (run *Run, err error) {
	err = e.withCheckpoint(ctx, container, dir, func(ctx context.Context, opt client.NewTaskOpts) error {
		run, err = e.Start(ctx, container, opt)
		return err
	})
	return run, err
}

// PrepareRestore creates the task of a restore and does not start it, which is the
// caller's to do, and so is its deletion.
func (e *Engine) PrepareRestore(ctx context.Context, container client.Container, dir string) (run *Run, err error) {
	err = e.withCheckpoint(ctx, container, dir, func(ctx context.Context, opt client.NewTaskOpts) error {
		run, err = e.prepare(ctx, container, opt)
		return err
	})
	return run, err
}

// withCheckpoint calls a function with the option that makes a new task a restore
// from a directory.
func (e *Engine) withCheckpoint(ctx context.Context, container client.Container, dir string, f func(context.Context, client.NewTaskOpts) error) error {
	leased, done, err := e.Client.WithLease(ctx)
	if err != nil {
		return fmt.Errorf("restore %s: %w", container.ID(), err)
	}
	// A lease that is not deleted expires after a day.
	defer func() { _ = done(context.WithoutCancel(ctx)) }()
	checkpoint, err := e.store(leased, dir)
	if errdefs.IsNotFound(err) { // the second time, the stale content is gone
		checkpoint, err = e.store(leased, dir)
	}
	if err != nil {
		return fmt.Errorf("restore %s: %w", container.ID(), err)
	}
	return f(leased, func(_ context.Context, _ *client.Client, i *client.TaskInfo) error {
		i.Checkpoint = checkpoint
		return nil
	})
}

// store writes a directory into the content store as a checkpoint. If the same
// content is there from an earlier restore, containerd reports that without
// regard to the lease, and may be about to remove it. Then the error is
// [errdefs.ErrNotFound].
func (e *Engine) store(ctx context.Context, dir string) (*types.Descriptor, error) {
	if _, err := os.Stat(dir); err != nil {
		return nil, err
	}
	tar := archive.Diff(ctx, "", dir)
	defer tar.Close()
	writer, err := content.OpenWriter(ctx, e.Client.ContentStore(), content.WithRef(fmt.Sprintf("checkpoint-%d", time.Now().UnixNano())),
		content.WithDescriptor(ocispec.Descriptor{MediaType: images.MediaTypeContainerd1Checkpoint}))
	if err != nil {
		return nil, err
	}
	defer writer.Close()
	digester := digest.SHA256.Digester()
	size, err := io.Copy(io.MultiWriter(writer, digester.Hash()), tar)
	if err != nil {
		return nil, err
	}
	err = writer.Commit(ctx, size, digester.Digest())
	if errdefs.IsAlreadyExists(err) {
		err = e.keep(ctx, digester.Digest())
	}
	if err != nil {
		return nil, err
	}
	return &types.Descriptor{MediaType: images.MediaTypeContainerd1Checkpoint, Digest: digester.Digest().String(), Size: size}, nil
}

// keep adds existing content to the context's lease.
func (e *Engine) keep(ctx context.Context, blob digest.Digest) error {
	id, _ := leases.FromContext(ctx)
	err := e.Client.LeasesService().AddResource(ctx, leases.Lease{ID: id}, leases.Resource{ID: blob.String(), Type: "content"})
	if err != nil {
		return err
	}
	_, err = e.Client.ContentStore().Info(ctx, blob)
	return err
}
