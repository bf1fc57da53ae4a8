package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/log"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/cgroup"
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
	mounts, err := mountsOf(root)
	if err != nil {
		return fmt.Errorf("mounts of the container: %w", err)
	}
	shares := shares(mounts)
	var st unix.Stat_t
	path := fmt.Sprintf("/proc/%d/root", root)
	if err := unix.Stat(path, &st); err != nil {
		return &os.PathError{Op: "stat", Path: path, Err: err}
	}
	if !shares[st.Dev] {
		return syncRoot(path)
	}
	pids, err := cgroup.Procs(c.tree(), true)
	if err != nil {
		return fmt.Errorf("processes of the container: %w", err)
	}
	files, err := writtenFiles(pids, shares)
	if err != nil {
		return fmt.Errorf("files that the container writes: %w", err)
	}
	for _, path := range files {
		if ctx.Err() != nil {
			return fmt.Errorf("write out the files of the container: %w", context.Cause(ctx))
		}
		if err := writeOutFile(ctx, path); err != nil {
			return err
		}
	}
	return nil
}

// shares are the devices of what the host shares with the guest.
func shares(mounts []*mountinfo.Info) map[uint64]bool {
	out := make(map[uint64]bool)
	for _, m := range mounts {
		if m.FSType == "virtiofs" || m.FSType == "fuse" || strings.HasPrefix(m.FSType, "fuse.") {
			out[unix.Mkdev(uint32(m.Major), uint32(m.Minor))] = true //nolint:gosec // device numbers
		}
	}
	return out
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

// writtenFiles lists the regular files on the devices that processes have open
// for writing or have mapped for all to see, each once, by links in /proc. Files
// without a name are left out.
func writtenFiles(pids []int, devices map[uint64]bool) ([]string, error) {
	type inode struct{ device, number uint64 }
	seen := make(map[inode]bool)
	var out []string
	add := func(link string) {
		var st unix.Stat_t
		if err := unix.Stat(link, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink == 0 || !devices[st.Dev] {
			return // closed or ended meanwhile, or nothing of ours
		}
		if i := (inode{st.Dev, st.Ino}); !seen[i] {
			seen[i] = true
			out = append(out, link)
		}
	}
	for _, pid := range pids {
		fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
		if err != nil {
			return nil, err
		}
		for _, fd := range fds {
			// A link's mode is that of the descriptor.
			if info, err := os.Lstat(fd); err == nil && info.Mode()&0o200 != 0 {
				add(fd)
			}
		}
		err = eachMapping(pid, func(m mapping) {
			if strings.HasSuffix(m.permissions, "s") { // whether or not it may be written to right now
				add(fmt.Sprintf("/proc/%d/map_files/%s", pid, mapFilesName(m.addresses)))
			}
		})
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}

// mapFilesName is the name in map_files of the addresses in maps, which are
// padded with zeros.
func mapFilesName(addresses string) string {
	var from, to uint64
	if _, err := fmt.Sscanf(addresses, "%x-%x", &from, &to); err != nil {
		return addresses
	}
	return fmt.Sprintf("%x-%x", from, to)
}
