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
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/archive"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/bundle"
)

// archiveName is the archive from which the container is to start, empty where
// it starts as any other: where its pod names none, and once it was restored.
// A container that ends and is started again by its pod's restart policy starts
// afresh, like one that never was in an archive.
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

// restoredRecord is a file that is there once the container of that name was
// restored in its pod. A pod's UID never comes again; a new sandbox of the same
// pod, after a node's crash, has the same.
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
	// restoredFor is how long a note is kept: longer than pods live.
	restoredFor = 366 * 24 * time.Hour
)

// recordRestored makes the note, and removes those of pods that are long gone.
func (c *container) recordRestored() error {
	note := c.restoredRecord()
	if err := os.MkdirAll(filepath.Dir(note), 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(note, nil, 0o600); err != nil {
		return err
	}
	notes, err := os.ReadDir(filepath.Dir(note))
	for _, n := range notes {
		if info, statErr := n.Info(); statErr == nil && time.Since(info.ModTime()) > restoredFor {
			err = errors.Join(err, os.Remove(filepath.Join(filepath.Dir(note), n.Name())))
		}
	}
	return err
}

// unpackDir is where an archive is unpacked, in the exchange directory, which
// goes with the container. Nobody has mounted that yet.
const unpackDir = "archive"

// prepareArchive makes of an ordinary Create the restore of an archive.
func (c *container) prepareArchive(ctx context.Context, name string, r *task.CreateTaskRequest, spec *bundle.Spec) error {
	begin := time.Now()
	cfg := c.s.cfg
	ctx, end := c.s.operation(ctx)
	defer end()
	fail := func(err error) error {
		return errclass.With(errdefs.ErrFailedPrecondition, fmt.Errorf("restore the container %s as annotation %s%s of its pod says: %w",
			annotations.ContainerName(c.annotations), annotations.RestorePrefix, annotations.ContainerName(c.annotations), err))
	}
	dir := c.exchange.path(unpackDir)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return fail(err)
	}
	defer func() {
		if err := os.RemoveAll(dir); err != nil {
			log.G(ctx).WithError(err).WithField("container", c.id).Warn("remove the unpacked archive")
		}
	}()
	err := archive.Extract(ctx, cfg.RestoreDir, name, dir, imageset.Limits{Files: cfg.MaxImageFiles, Bytes: cfg.MaxImageBytes})
	if errors.Is(err, fs.ErrNotExist) {
		return fail(fmt.Errorf("there is no archive %s in %s on this node: put it there, or name another one", name, cfg.RestoreDir))
	}
	if err != nil {
		return fail(err)
	}
	manifest, err := c.stageImages(ctx, filepath.Join(dir, imageset.ArchiveImages), r.Rootfs, spec, func(m *imageset.Manifest) error {
		// Whoever may make pods in one namespace has no claim to another one's memory.
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
