// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
	"github.com/kata-checkpoint/kata-checkpoint/internal/archive"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
	"github.com/kata-checkpoint/kata-checkpoint/internal/remove"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/bundle"
)

// archiveName returns the archive that the container is to be restored from, or
// an empty name if its pod names none or it has been restored before: a
// container that the pod's restart policy restarts begins afresh.
func (c *container) archiveName() (string, error) {
	name := annotations.RestoreArchive(c.annotations)
	if name == "" || c.kind != annotations.InPod {
		return "", nil
	}
	done, err := c.onceRecord().done()
	if err != nil || done {
		return "", err
	}
	return name, nil
}

// unpackDir is the directory in the exchange directory in which an archive is
// unpacked. It is removed with the container at the latest, and before Create
// nobody has mounted it.
const unpackDir = "archive"

// prepareArchive turns an ordinary Create into the restore of an archive.
func (c *container) prepareArchive(ctx context.Context, name string, r *task.CreateTaskRequest, spec *bundle.Spec) error {
	begin := time.Now()
	cfg := c.s.cfg
	ctx, end := c.s.operation(ctx)
	defer end()
	fail := func(err error) error {
		return errclass.With(errdefs.ErrFailedPrecondition, fmt.Errorf("restore container %s as requested by annotation %s%s of its pod: %w",
			annotations.ContainerName(c.annotations), annotations.RestorePrefix, annotations.ContainerName(c.annotations), err))
	}
	if err := c.permitArchive(ctx, name); err != nil {
		return fail(err)
	}
	dir := c.exchange.path(unpackDir)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return fail(err)
	}
	defer func() {
		if err := remove.All(dir); err != nil {
			log.G(ctx).WithError(err).WithField("container", c.id).Warn("failed to remove unpacked archive")
		}
	}()
	if err := archive.Extract(ctx, cfg.RestoreDir, name, dir, c.s.limits()); err != nil {
		return fail(err)
	}
	source, err := c.stageImages(ctx, filepath.Join(dir, imageset.ArchiveImages), true, r.Rootfs, spec, nil)
	if err != nil {
		return fail(fmt.Errorf("archive %s: %w", name, err))
	}
	if err := c.setPlaceholder(spec); err != nil {
		return err
	}
	source.path, source.once = filepath.Join(cfg.RestoreDir, name), c.onceRecord()
	source.staged = time.Since(begin)
	c.source = source
	c.logStaged(ctx, source, source.staged)
	return nil
}

// permitArchive reads the manifest of an archive before anything else is done with
// it, and refuses one of another namespace. Whoever may create pods in one
// namespace learns nothing of the archives of others: not even whether there is
// one of that name. What this node's operator has to know is in the log.
func (c *container) permitArchive(ctx context.Context, name string) error {
	m, err := archive.Manifest(ctx, c.s.cfg.RestoreDir, name)
	if errors.Is(err, archive.ErrName) || ctx.Err() != nil {
		return err
	}
	if err == nil {
		err = c.permitNamespace(m)
	}
	if err == nil {
		return nil
	}
	log.G(ctx).WithError(err).WithFields(log.Fields{"container": c.id, "archive": name}).Warn("archive cannot be restored in this pod")
	return errcode.NoArchive.Errorf("there is no archive %s in %s on this node that a pod in the namespace %q may be restored from: put it there, or name another one",
		name, c.s.cfg.RestoreDir, annotations.PodNamespace(c.annotations))
}
