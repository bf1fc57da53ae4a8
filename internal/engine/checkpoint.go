// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	tasks "github.com/containerd/containerd/api/services/tasks/v1"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/rootfs"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/typeurl/v2"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
	"github.com/kata-checkpoint/kata-checkpoint/internal/budget"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
	"github.com/kata-checkpoint/kata-checkpoint/internal/progress"
	"github.com/kata-checkpoint/kata-checkpoint/internal/store"
)

// resumeTimeout bounds how long a container may take to resume.
const resumeTimeout = time.Minute

// ErrChanged is wrapped by errors after which a container is not as it was
// before.
var ErrChanged = errors.New("see its state")

// changed is an error of [ErrChanged] that says all itself.
func changed(format string, args ...any) error {
	return errclass.With(ErrChanged, fmt.Errorf(format, args...))
}

// Options are those of a checkpoint.
type Options struct {
	// Stop: the container is stopped. The annotation kata-checkpoint.dev/after
	// overrides it.
	Stop bool
	// TCP: established connections are included.
	TCP bool
}

// Stops is what becomes of a container about which the user says nothing.
func (c *Container) Stops() bool {
	if after, _ := annotations.After(c.spec.Annotations); after != "" {
		return after == annotations.Stop
	}
	if c.Kind == CRI {
		return c.node.Config.AfterCheckpointCRI == annotations.Stop
	}
	return c.node.Config.AfterCheckpoint == annotations.Stop
}

// Checkpoint is one that was made.
type Checkpoint struct {
	*store.Record
	// Dump is how long the shim took for it.
	Dump time.Duration
	// Warnings are what is missing in it.
	Warnings []string
}

// Checkpoint makes a checkpoint of a container and gives it its name in the
// store. After an error or the end of ctx the container is as it was before.
func (c *Container) Checkpoint(ctx context.Context, s *store.Store, name string, o Options, bar progress.Bar) (*Checkpoint, error) {
	draft, err := s.Begin(name)
	if err != nil {
		return nil, err
	}
	j := &job{Container: c, draft: draft, options: o, bar: bar, begin: time.Now()}
	out, err := j.run(ctx)
	if err := errclass.Join(err, draft.Abort()); err != nil {
		return nil, fmt.Errorf("checkpoint %s: %w", c, err)
	}
	return out, nil
}

// job is a checkpoint in progress.
type job struct {
	*Container
	draft   *store.Draft
	options Options
	bar     progress.Bar
	begin   time.Time
	task    client.Task
	// status that the container had before.
	status client.ProcessStatus
	// release ends what resumes the container if this process is killed.
	release func()
	paused  time.Time
	frozen  time.Duration
	out     *Checkpoint
}

func (j *job) run(ctx context.Context) (_ *Checkpoint, err error) {
	if err := j.prepare(ctx); err != nil {
		return nil, err
	}
	if err := j.pause(ctx); err != nil {
		// It may have come through.
		return nil, errclass.Join(err, j.resume(ctx))
	}
	err = j.capture(ctx, "")
	if rerr := j.resume(ctx); err == nil && !j.out.Stopped {
		err = rerr
	}
	if err != nil {
		return nil, err
	}
	return j.commit(ctx)
}

// prepare finds what would make the checkpoint fail.
func (j *job) prepare(ctx context.Context) (err error) {
	ctx = j.in(ctx)
	if err := j.checkable(); err != nil {
		return err
	}
	if j.task, err = j.c.Task(ctx, nil); errdefs.IsNotFound(err) {
		return errcode.NotStarted.Wrap(errors.New("it does not run: start it first"))
	}
	if err != nil {
		return err
	}
	status, err := j.task.Status(ctx)
	if err != nil {
		return err
	}
	if status.Status != client.Running && status.Status != client.Paused {
		return errcode.NotStarted.Errorf("it is %s, and only a container that runs or is paused can be checkpointed: start it first", status.Status)
	}
	j.status = status.Status
	return nil
}

func (j *job) pause(ctx context.Context) error {
	j.paused = time.Now()
	if j.status == client.Paused {
		return nil
	}
	if j.node.Guard != nil {
		var err error
		if j.release, err = j.node.Guard(j.Namespace, j.ID); err != nil {
			return fmt.Errorf("start what resumes the container if this command is killed: %w", err)
		}
	}
	j.bar.Phase("freeze", 0)
	if err := j.task.Pause(j.in(ctx)); err != nil {
		return err
	}
	// Whoever asks for the state of a paused container relies on it: the shim does
	// not thaw it before its Resume, whatever its annotations say. Its root file
	// system is read until then.
	_, err := j.task.Status(j.in(ctx))
	return err
}

// resume undoes pause, whatever has become of ctx.
func (j *job) resume(ctx context.Context) error {
	if j.status == client.Paused {
		return nil
	}
	if j.release != nil {
		defer j.release()
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(j.in(ctx)), resumeTimeout)
	defer cancel()
	err := j.task.Resume(ctx)
	j.frozen = time.Since(j.paused)
	if status, serr := j.task.Status(ctx); serr == nil && status.Status != client.Paused && status.Status != client.Pausing {
		return nil // the shim has resumed or stopped it
	}
	if err != nil {
		return changed("the container is still paused, because it cannot be resumed: %w; resume it: ctr -n %s task resume %s", err, j.Namespace, j.ID)
	}
	return nil
}

// Resume resumes a container if it is paused.
func (n *Node) Resume(ctx context.Context, namespace, id string) error {
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(ctx, namespace), resumeTimeout)
	defer cancel()
	c, err := n.client.LoadContainer(ctx, id)
	if err != nil {
		return err
	}
	task, err := c.Task(ctx, nil)
	if err != nil {
		return err
	}
	// Whatever was in progress: it is resumed after that, or needs it no more.
	err = task.Resume(ctx)
	if status, serr := task.Status(ctx); serr == nil && status.Status != client.Paused && status.Status != client.Pausing {
		return nil
	}
	return err
}

// capture writes the draft of a paused container, all but its record.
func (j *job) capture(ctx context.Context, group string) error {
	j.out = &Checkpoint{Record: &store.Record{
		Group: group, Created: time.Now().UTC(), Engine: string(j.Kind), Namespace: j.Namespace, Container: j.ID, ContainerName: j.Name,
		Pod: j.Pod, Image: j.image(), Runtime: j.info.Runtime.Name,
	}}
	if err := j.dump(ctx); err != nil {
		return err
	}
	status, err := j.task.Status(j.in(context.WithoutCancel(ctx)))
	j.out.Stopped = errdefs.IsNotFound(err) || err == nil && status.Status == client.Stopped
	// What has been stopped must have its checkpoint.
	if j.out.Stopped {
		ctx = context.WithoutCancel(ctx)
	}
	if err := j.rootfs(ctx); err != nil {
		err = fmt.Errorf("the changes of its root file system cannot be read: %w", err)
		if !j.out.Stopped {
			return err
		}
		j.out.Warnings = append(j.out.Warnings, err.Error()+": the checkpoint is without them, and can be restored as long as the container exists")
		if rerr := os.Remove(j.draft.File(imageset.RootfsDiffName)); rerr != nil && !errors.Is(rerr, fs.ErrNotExist) {
			return rerr
		}
	}
	return j.describe()
}

// dump has the shim write the image set.
func (j *job) dump(ctx context.Context) error {
	options, err := typeurl.MarshalAnyToProto(&runcoptions.CheckpointOptions{
		Exit: j.options.Stop, OpenTcp: j.options.TCP, FileLocks: true, ImagePath: j.draft.Images(), WorkPath: j.draft.Path(),
	})
	if err != nil {
		return err
	}
	j.bar.Phase("dump", j.estimate(ctx))
	watch, stop := context.WithCancel(ctx)
	group := &errgroup.Group{}
	group.Go(func() error { j.watch(watch); return nil })
	begin := time.Now()
	_, err = j.node.client.TaskService().Checkpoint(j.in(ctx), &tasks.CheckpointTaskRequest{ContainerID: j.ID, Options: options})
	stop()
	_ = group.Wait() // watch has no error
	j.out.Dump = time.Since(begin)
	if err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return errgrpc.ToNative(err)
	}
	n := sizeOf(j.draft.Images())
	j.bar.Total(n)
	j.bar.Set(n)
	return nil
}

// watchInterval is how often the size of a growing image set is looked at.
const watchInterval = 100 * time.Millisecond

// watch tells how much of the image set there is.
func (j *job) watch(ctx context.Context) {
	tick := time.NewTicker(watchInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			j.bar.Set(sizeOf(j.draft.Images()))
		}
	}
}

// sizeOf is the size of all files below a directory, as far as they can be
// read.
func sizeOf(dir string) (n int64) {
	_ = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return nil //nolint:nilerr // it may have been moved
		}
		if info, err := d.Info(); err == nil {
			n += info.Size()
		}
		return nil
	})
	return n
}

// rootfs writes the changes of the root file system, if containerd has it.
func (j *job) rootfs(ctx context.Context) error {
	if j.info.SnapshotKey == "" {
		return nil
	}
	j.bar.Phase("root file system", 0)
	cc := j.node.client
	ctx, done, err := cc.WithLease(j.in(ctx))
	if err != nil {
		return err
	}
	defer func() { _ = done(context.WithoutCancel(ctx)) }() // it expires
	desc, err := rootfs.CreateDiff(ctx, j.info.SnapshotKey, cc.SnapshotService(j.info.Snapshotter), cc.DiffService(), diff.WithMediaType(ocispec.MediaTypeImageLayer))
	if err != nil {
		return err
	}
	blob, err := cc.ContentStore().ReaderAt(ctx, desc)
	if err != nil {
		return err
	}
	defer blob.Close()
	f, err := os.OpenFile(j.draft.File(imageset.RootfsDiffName), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, budget.Reader(ctx, content.NewReader(blob)))
	return errclass.Join(err, f.Close())
}

// commit gives the checkpoint its name.
func (j *job) commit(ctx context.Context) (*Checkpoint, error) {
	if j.out.Stopped {
		ctx = context.WithoutCancel(ctx)
	}
	j.bar.Phase("store", 0)
	j.out.Took, j.out.Frozen = time.Since(j.begin), j.frozen
	if err := j.draft.Commit(ctx, j.out.Record); err != nil {
		if j.out.Stopped {
			return nil, changed("the container was stopped and its checkpoint cannot be stored: %w", err)
		}
		return nil, err
	}
	return j.out, nil
}

// CheckpointPod makes a checkpoint of each container of a pod, all of one
// instant: none is captured before all are paused. They have names that begin
// with that of the group. After an error all that were begun are gone.
func (n *Node) CheckpointPod(ctx context.Context, s *store.Store, group string, containers []*Container, o Options, bars func(name string) progress.Bar) (_ []*Checkpoint, err error) {
	if err := store.CheckName(group); err != nil {
		return nil, err
	}
	if old, err := s.Group(group); err != nil || len(old) > 0 {
		if err != nil {
			return nil, err
		}
		return nil, fmt.Errorf("%s: %w: choose another one, or remove it (kata-checkpoint rm %s)", group, store.ErrExists, group)
	}
	var jobs []*job
	defer func() {
		for _, j := range jobs {
			err = errclass.Join(err, j.draft.Abort())
		}
	}()
	for _, c := range containers {
		draft, err := s.Begin(group + "-" + c.Name)
		if err != nil {
			return nil, err
		}
		j := &job{Container: c, draft: draft, options: Options{TCP: o.TCP}, bar: bars(c.Name), begin: time.Now()}
		jobs = append(jobs, j)
		if err := j.prepare(ctx); err != nil {
			return nil, fmt.Errorf("checkpoint %s: %w", c, err)
		}
	}
	if err := pauseAll(ctx, jobs, func() error {
		return each(ctx, jobs, func(ctx context.Context, j *job) error { return j.capture(ctx, group) })
	}); err != nil {
		return nil, err
	}
	var out []*Checkpoint
	for _, j := range jobs {
		made, err := j.commit(ctx)
		if err != nil {
			for _, done := range out {
				if c, oerr := s.Open(done.Name); oerr == nil {
					err = errclass.Join(err, s.Remove(c))
				}
			}
			return nil, err
		}
		out = append(out, made)
	}
	return out, nil
}

// pauseAll pauses all, does something, and resumes all that it has paused.
func pauseAll(ctx context.Context, jobs []*job, do func() error) (err error) {
	err = each(ctx, jobs, func(ctx context.Context, j *job) error { return j.pause(ctx) })
	if err == nil {
		err = do()
	}
	// Also those whose Pause has failed: it may have come through.
	return errclass.Join(err, each(context.WithoutCancel(ctx), jobs, func(ctx context.Context, j *job) error { return j.resume(ctx) }))
}

// each does something for all at the same time, and returns all errors.
func each(ctx context.Context, jobs []*job, do func(context.Context, *job) error) error {
	errs := make([]error, len(jobs))
	group, gctx := errgroup.WithContext(ctx)
	for i, j := range jobs {
		group.Go(func() error {
			if err := do(gctx, j); err != nil {
				errs[i] = fmt.Errorf("checkpoint %s: %w", j.Container, err)
				return errs[i]
			}
			return nil
		})
	}
	first := group.Wait()
	if first == nil || ctx.Err() != nil {
		return first
	}
	// What was cancelled because of another one's failure says nothing.
	var own []error
	for _, err := range errs {
		if err != nil && (err == first || !isCanceled(err)) { //nolint:errorlint // the same one
			own = append(own, err)
		}
	}
	return errclass.Join(own...)
}

func isCanceled(err error) bool {
	return errors.Is(err, context.Canceled) || errdefs.IsCanceled(err) || strings.Contains(err.Error(), "context canceled")
}
