// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"fmt"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
)

// writeOut makes what a frozen container has written visible to the host, where
// engines diff its root file system, some of them before they checkpoint it
// (`ctr containers checkpoint --rw --task`).
//
// A root on a disk of the guest's own is synced. One that the host shares is
// not: the host would write back everything that anyone has written to that
// file system, while the container is frozen. There the guest only caches what
// processes have mapped and, if the share is mounted with a writeback cache,
// what they have open.
func (c *container) writeOut(ctx context.Context) error {
	pids, err := c.pids()
	if err != nil {
		return err
	}
	look, err := inspect.LookAtFiles(ctx, c.root().PID, pids, c.Mounts)
	if err != nil {
		return err
	}
	if shared, answers := look.RootIsShared(); answers && !shared {
		return syncRoot(fmt.Sprintf("/proc/%d/root", c.root().PID))
	}
	files, err := look.WrittenFiles(ctx)
	if err != nil {
		return err
	}
	for _, file := range files {
		if ctx.Err() != nil {
			return fmt.Errorf("write out the files of the container: %w", context.Cause(ctx))
		}
		if err := writeOutFile(ctx, file); err != nil {
			return err
		}
	}
	return nil
}

// syncRoot syncs the file system of a directory.
func syncRoot(path string) error {
	root, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("sync the root file system: %w", err)
	}
	defer unix.Close(root)
	if err := unix.Syncfs(root); err != nil {
		return fmt.Errorf("sync the root file system: %w", err)
	}
	return nil
}

// writeOutFile has the guest's kernel send what it caches of a shared file to
// the host, which it does when the file is closed (fs/fuse/file.c, fuse_flush).
// A file that cannot be opened cannot be diffed either, such as one on a
// network file system that does not trust root.
func writeOutFile(ctx context.Context, file inspect.WrittenFile) error {
	fd, err := file.Open()
	if err != nil {
		log.G(ctx).WithError(err).WithField("file", file.Link).Warn("failed to write out a file")
		return nil
	}
	err = unix.SyncFileRange(fd, 0, 0, unix.SYNC_FILE_RANGE_WAIT_BEFORE|unix.SYNC_FILE_RANGE_WRITE|unix.SYNC_FILE_RANGE_WAIT_AFTER)
	if err = errclass.Join(err, unix.Close(fd)); err != nil {
		return fmt.Errorf("write out file %s of the container: %w", file.Link, err)
	}
	return nil
}
