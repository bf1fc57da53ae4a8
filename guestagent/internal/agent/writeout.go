package agent

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
)

// writeOut brings what a frozen container has written to where the host sees
// it: engines diff its root file system there, some of them before they
// checkpoint it (`ctr containers checkpoint --rw --task`).
//
// A root on the guest's own disk is synced. One that the host shares is not:
// the host would write out to its disk what anybody on it has written to that
// file system, for as long as the disk takes, and the container stands still
// meanwhile. There the guest keeps back what processes have mapped, and,
// where the share is mounted with a writeback cache, what they have open.
func (c *container) writeOut(ctx context.Context) error {
	root := c.root().PID
	mounts, err := inspect.Mounts(root)
	if err != nil {
		return fmt.Errorf("mounts of the container: %w", err)
	}
	shares := inspect.Shares(mounts)
	var st unix.Stat_t
	path := fmt.Sprintf("/proc/%d/root", root)
	if err := unix.Stat(path, &st); err != nil {
		return &os.PathError{Op: "stat", Path: path, Err: err}
	}
	if !shares[st.Dev] {
		return syncRoot(path)
	}
	pids, err := c.pids()
	if err != nil {
		return err
	}
	processes, err := inspect.Processes(pids)
	if err != nil {
		return err
	}
	for _, path := range inspect.WrittenFiles(processes, shares) {
		if ctx.Err() != nil {
			return fmt.Errorf("write out the files of the container: %w", context.Cause(ctx))
		}
		if err := writeOutFile(ctx, path); err != nil {
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

// writeOutFile has the guest's kernel send to the host what it holds of a file
// of a share: it does when one closes it who has opened it (fs/fuse/file.c,
// fuse_flush). A file that cannot be opened is none that can be diffed: one of a
// network file system that trusts no root, for one.
func writeOutFile(ctx context.Context, path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		log.G(ctx).WithError(err).WithField("file", path).Warn("what the guest holds of a file is not written out")
		return nil
	}
	err = unix.SyncFileRange(fd, 0, 0, unix.SYNC_FILE_RANGE_WAIT_BEFORE|unix.SYNC_FILE_RANGE_WRITE|unix.SYNC_FILE_RANGE_WAIT_AFTER)
	if err = errors.Join(err, unix.Close(fd)); err != nil {
		return fmt.Errorf("write out a file of the container, %s: %w", path, err)
	}
	return nil
}
