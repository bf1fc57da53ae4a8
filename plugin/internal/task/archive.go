// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
	"github.com/kata-checkpoint/kata-checkpoint/internal/remove"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/archive"
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
	_, err := os.Lstat(c.restoredRecord())
	if errors.Is(err, fs.ErrNotExist) {
		return name, nil
	}
	return "", err
}

// restoredRecord is the file that records that the container of this name was
// restored in its pod. A pod's UID is never reused; a new sandbox of the same
// pod, as after a node's crash, has the same.
func (c *container) restoredRecord() string {
	pod := annotations.PodUID(c.annotations)
	if pod == "" {
		pod = c.s.sandbox
	}
	return filepath.Join(c.s.cfg.StateDir, restoredDir, filepath.Base(annotations.PodNamespace(c.annotations)+"--"+pod+"--"+annotations.ContainerName(c.annotations)))
}

const (
	// restoredDir is below the state directory.
	restoredDir = "restored"
	// restoredFor is how long a record is kept: longer than pods live.
	restoredFor = 366 * 24 * time.Hour
)

// recordRestored writes the record, and removes those of pods that are long
// gone.
func (c *container) recordRestored() error {
	record := c.restoredRecord()
	if err := os.MkdirAll(filepath.Dir(record), 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(record, nil, 0o600); err != nil {
		return err
	}
	records, err := os.ReadDir(filepath.Dir(record))
	for _, n := range records {
		if info, statErr := n.Info(); statErr == nil && time.Since(info.ModTime()) > restoredFor {
			err = errclass.Join(err, os.Remove(filepath.Join(filepath.Dir(record), n.Name())))
		}
	}
	return err
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
	dir := c.exchange.path(unpackDir)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return fail(err)
	}
	defer func() {
		if err := remove.All(dir); err != nil {
			log.G(ctx).WithError(err).WithField("container", c.id).Warn("failed to remove unpacked archive")
		}
	}()
	err := archive.Extract(ctx, cfg.RestoreDir, name, dir, c.s.limits())
	if errors.Is(err, fs.ErrNotExist) {
		return fail(fmt.Errorf("there is no archive %s in %s on this node: put it there, or name another one", name, cfg.RestoreDir))
	}
	if err != nil {
		return fail(err)
	}
	manifest, err := c.stageImages(ctx, filepath.Join(dir, imageset.ArchiveImages), r.Rootfs, spec, func(m *imageset.Manifest) error {
		// Whoever may create pods in one namespace may not read the memory of pods in
		// another.
		if have := annotations.PodNamespace(c.annotations); m.Container.PodNamespace != have {
			return fmt.Errorf("it was made of a container of the namespace %q, and this pod is in %q: archives are restored in their own namespace", m.Container.PodNamespace, have)
		}
		return nil
	})
	if err != nil {
		return fail(fmt.Errorf("archive %s: %w", name, err))
	}
	rights := rightsOf(spec.Process)
	if err := c.setPlaceholder(spec); err != nil {
		return err
	}
	c.source = &source{manifest: manifest, path: filepath.Join(cfg.RestoreDir, name), rights: rights, done: c.recordRestored}
	c.logStaged(ctx, begin)
	return nil
}
