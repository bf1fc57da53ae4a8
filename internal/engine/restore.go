// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	tasks "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	tararchive "github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
	"github.com/kata-checkpoint/kata-checkpoint/internal/progress"
	"github.com/kata-checkpoint/kata-checkpoint/internal/remove"
	"github.com/kata-checkpoint/kata-checkpoint/internal/store"
)

// RestoreOptions are those of a restore.
type RestoreOptions struct {
	// Log is where the output goes, a URI such as file:///path; empty: where it
	// went before, if that is a URI, or nowhere.
	Log string
}

// Restore continues a checkpoint in a container, which must not run.
func (c *Container) Restore(ctx context.Context, from *store.Checkpoint, o RestoreOptions, bar progress.Bar) error {
	if err := c.checkable(); err != nil {
		return err
	}
	if c.Kind == Docker {
		return c.restoreDocker(ctx, from, bar)
	}
	ctx = c.in(ctx)
	log, err := c.clear(ctx, o.Log)
	if err != nil {
		return fmt.Errorf("restore %s: %w", c, err)
	}
	if err := c.start(ctx, from, log, bar); err != nil {
		return fmt.Errorf("restore %s: %w", c, err)
	}
	return nil
}

// clear deletes the task that the container had, and returns where its output
// goes.
func (c *Container) clear(ctx context.Context, log string) (string, error) {
	answer, err := c.c.Task(ctx, nil)
	if errdefs.IsNotFound(err) {
		return log, nil
	}
	if err != nil {
		return "", err
	}
	status, err := answer.Status(ctx)
	if err != nil && !errdefs.IsNotFound(err) {
		return "", err
	}
	if err == nil && status.Status != client.Stopped {
		return "", errcode.ContainerRuns.Errorf("the container is %s, and only one that does not run can continue from a checkpoint: stop it first, or restore into another one (--container or --new)", status.Status)
	}
	if log == "" {
		log = c.formerLog(ctx)
	}
	if _, err := answer.Delete(ctx); err != nil && !errdefs.IsNotFound(err) {
		return "", err
	}
	return log, nil
}

// formerLog is the URI to which the container's output went.
func (c *Container) formerLog(ctx context.Context) string {
	out, err := c.stdout(ctx)
	if err == nil && strings.Contains(out, "://") {
		return out
	}
	return c.info.Labels["nerdctl/log-uri"]
}

// stdout is where the output of the container's task goes.
func (c *Container) stdout(ctx context.Context) (string, error) {
	answer, err := c.node.client.TaskService().Get(ctx, &tasks.GetRequest{ContainerID: c.ID})
	if err != nil {
		return "", err
	}
	return answer.GetProcess().GetStdout(), nil
}

// start creates and starts a task from a checkpoint.
func (c *Container) start(ctx context.Context, from *store.Checkpoint, log string, bar progress.Bar) error {
	terminal := c.spec.Process != nil && c.spec.Process.Terminal
	streams := func(string) (cio.IO, error) {
		return &uriIO{cio.Config{Stdout: log, Stderr: log, Terminal: terminal}}, nil
	}
	if terminal {
		streams = func(string) (cio.IO, error) { return &uriIO{cio.Config{Stdout: log, Terminal: true}}, nil }
	}
	bar.Phase("prepare", 0)
	opt, done, err := c.checkpointOption(ctx, from, bar)
	if err != nil {
		return err
	}
	defer done()
	bar.Phase("create", 0)
	task, err := c.c.NewTask(ctx, streams, opt)
	if err != nil {
		return err
	}
	bar.Phase("restore", 0)
	if _, err = task.Wait(context.WithoutCancel(ctx)); err == nil {
		err = task.Start(ctx)
	}
	if err == nil {
		return nil
	}
	uctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), resumeTimeout)
	defer cancel()
	if _, derr := task.Delete(uctx, client.WithProcessKill); derr != nil && !errdefs.IsNotFound(derr) {
		err = errclass.Join(err, derr)
	}
	return err
}

// checkpointOption has containerd hand the checkpoint to the shim: by its path,
// if the container has no options of its own for the runtime, which containerd
// would replace by those with the path; else by way of its content store.
func (c *Container) checkpointOption(ctx context.Context, from *store.Checkpoint, bar progress.Bar) (client.NewTaskOpts, func(), error) {
	if c.info.Runtime.Options == nil || c.info.Runtime.Options.GetTypeUrl() == "" {
		return client.WithRestoreImagePath(from.Images()), func() {}, nil
	}
	ctx, release, err := c.node.client.WithLease(ctx)
	if err != nil {
		return nil, nil, err
	}
	done := func() { _ = release(context.WithoutCancel(ctx)) } // it expires
	desc, err := c.upload(ctx, from, bar)
	if err != nil {
		done()
		return nil, nil, fmt.Errorf("store the checkpoint in containerd: %w", err)
	}
	return func(_ context.Context, _ *client.Client, i *client.TaskInfo) error {
		i.Checkpoint = desc
		return nil
	}, done, nil
}

// upload writes an image set into containerd's content store.
func (c *Container) upload(ctx context.Context, from *store.Checkpoint, bar progress.Bar) (*types.Descriptor, error) {
	bar.Phase("copy", sizeOf(from.Images()))
	tar := tararchive.Diff(ctx, "", from.Images())
	defer tar.Close()
	desc := ocispec.Descriptor{MediaType: images.MediaTypeContainerd1Checkpoint}
	w, err := content.OpenWriter(ctx, c.node.client.ContentStore(), content.WithRef("kata-checkpoint-"+strings.ToLower(rand.Text())), content.WithDescriptor(desc))
	if err != nil {
		return nil, err
	}
	defer w.Close()
	digester := digest.SHA256.Digester()
	n, err := io.Copy(io.MultiWriter(w, digester.Hash(), adder{bar}), tar)
	if err == nil {
		err = w.Commit(ctx, n, digester.Digest())
	}
	if err != nil && !errdefs.IsAlreadyExists(err) {
		return nil, err
	}
	return &types.Descriptor{MediaType: desc.MediaType, Digest: digester.Digest().String(), Size: n}, nil
}

type adder struct{ progress.Bar }

// Write implements [io.Writer].
func (a adder) Write(p []byte) (int, error) {
	a.Add(int64(len(p)))
	return len(p), nil
}

// uriIO are streams that nobody on this side reads.
type uriIO struct{ config cio.Config }

// Config, Cancel, Wait and Close implement [cio.IO].
func (u *uriIO) Config() cio.Config { return u.config }

// Cancel implements [cio.IO].
func (*uriIO) Cancel() {}

// Wait implements [cio.IO].
func (*uriIO) Wait() {}

// Close implements [cio.IO].
func (*uriIO) Close() error { return nil }

// RestoreNew continues a checkpoint of a container of ctr's in a new container
// with the same specification, image and files.
func (n *Node) RestoreNew(ctx context.Context, from *store.Checkpoint, id string, o RestoreOptions, bar progress.Bar) (*Container, error) {
	if from.Engine != string(Containerd) {
		return nil, errcode.ForeignEngine.Errorf("checkpoint %s is of a container of %s, which makes its own containers: create one there, and restore into it with --container", from.Name, from.Engine)
	}
	data, err := os.ReadFile(from.File(store.SpecName))
	if err != nil {
		return nil, err
	}
	spec := &specs.Spec{}
	if err := json.Unmarshal(data, spec); err != nil {
		return nil, fmt.Errorf("checkpoint %s: %s is damaged: %w", from.Name, store.SpecName, err)
	}
	delete(spec.Annotations, nameAnnotation)
	if spec.Linux != nil {
		spec.Linux.CgroupsPath = filepath.Join("/", from.Namespace, id)
	}
	c := &Container{node: n, Namespace: from.Namespace, ID: id, Kind: Containerd, spec: spec}
	ctx = c.in(ctx)
	if from.Image == "" {
		return nil, errcode.NoImage.Errorf("checkpoint %s does not name the image of its container: create a container, and restore into it with --container", from.Name)
	}
	if err := n.listens(); err != nil {
		return nil, err
	}
	image, err := n.client.GetImage(ctx, from.Image)
	if err != nil {
		return nil, errcode.NoImage.Errorf("restore %s: image %s: %w: pull it first (ctr -n %s image pull)", id, from.Image, err, from.Namespace)
	}
	if c.c, err = n.client.NewContainer(ctx, id, client.WithImage(image), client.WithNewSnapshot(id, image),
		client.WithRuntime(from.Runtime, nil), client.WithSpec(spec)); err != nil {
		return nil, fmt.Errorf("restore %s: %w", id, err)
	}
	if c.info, err = c.c.Info(ctx); err == nil {
		err = c.start(ctx, from, o.Log, bar)
	}
	if err != nil {
		uctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), resumeTimeout)
		defer cancel()
		return nil, fmt.Errorf("restore %s: %w", id, errclass.Join(err, c.c.Delete(uctx, client.WithSnapshotCleanup)))
	}
	return c, nil
}

// restoreDocker has Docker start the container from a copy of the checkpoint
// among Docker's own, which it needs as long as it starts.
func (c *Container) restoreDocker(ctx context.Context, from *store.Checkpoint, bar progress.Bar) error {
	fail := func(err error) error { return fmt.Errorf("restore %s: %w", c, err) }
	root, err := c.node.dockerRoot(ctx)
	if err != nil {
		return fail(err)
	}
	name := "kata-checkpoint-" + strings.ToLower(rand.Text())
	dir := filepath.Join(root, "containers", c.ID, "checkpoints")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fail(err)
	}
	bar.Phase("copy", sizeOf(from.Images()))
	set, err := imageset.Open(from.Images())
	if err != nil {
		return fail(err)
	}
	defer set.Close()
	target := filepath.Join(dir, name)
	err = set.CopyWhole(ctx, target, imageset.Limits{Files: c.node.Config.MaxImageFiles, Bytes: c.node.Config.MaxImageBytes, Reserve: c.node.Config.ReserveBytes})
	if err == nil {
		bar.Phase("restore", 0)
		err = c.node.docker(ctx, http.MethodPost, "/containers/"+c.ID+"/start?checkpoint="+url.QueryEscape(name), nil)
	}
	if err := errclass.Join(err, remove.All(target)); err != nil {
		return fail(err)
	}
	return nil
}

// Annotations are what a pod needs so that its containers continue from
// checkpoints of a pod's containers, whose archives have these names.
func Annotations(list []*store.Checkpoint, archive func(*store.Checkpoint) string) (map[string]string, error) {
	out := map[string]string{}
	for _, c := range list {
		if c.Pod == nil {
			return nil, errcode.PodContainer.Errorf("checkpoint %s is not of a container of a pod", c.Name)
		}
		key := annotations.RestorePrefix + c.ContainerName
		if out[key] != "" {
			return nil, errcode.PodContainer.Errorf("two checkpoints are of a container with the name %s: restore them one by one", c.ContainerName)
		}
		out[key] = archive(c)
	}
	return out, nil
}
