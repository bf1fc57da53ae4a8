// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	file_lock "github.com/checkpoint-restore/go-criu/v7/crit/images/file-lock"
	"github.com/containerd/log"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/cgroup"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/relock"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/procfs"
)

// locksImage has the locks of files.
const locksImage = "filelocks.img"

// relockCgroup is where a restored process is while it takes its locks again.
const relockCgroup = "relock"

// posixLock is FL_POSIX in an image (criu/include/file-lock.h).
const posixLock = 1

// relockFiles has restored processes, which are frozen, take the POSIX locks again
// that CRIU has lost. They are frozen afterwards as well.
func relockFiles(ctx context.Context, c *container, images, tree string) error {
	locks := make(map[int][]relock.Lock)
	err := editImage(filepath.Join(images, locksImage), func(l *file_lock.FileLockEntry) bool {
		if l.GetFlag() == posixLock {
			pid := int(l.GetPid())
			locks[pid] = append(locks[pid], relock.Lock{FD: int(l.GetFd()), Type: int16(l.GetType()), Start: l.GetStart(), Length: l.GetLen()}) //nolint:gosec // F_RDLCK or F_WRLCK
		}
		return false
	})
	if err != nil || len(locks) == 0 {
		return err
	}
	pids, err := cgroup.Procs(tree, true)
	if err != nil {
		return fmt.Errorf("list the restored processes: %w", err)
	}
	apart := filepath.Join(c.Cgroup, relockCgroup)
	moved := false
	for _, pid := range pids {
		inner, err := procfs.NSPIDs(pid)
		if err != nil {
			return err
		}
		lost := relock.Lost(pid, locks[inner[len(inner)-1]])
		if len(lost) == 0 {
			continue
		}
		if err := os.Mkdir(apart, 0o755); err != nil && !os.IsExist(err) {
			return fmt.Errorf("make cgroup: %w", err)
		}
		moved = true
		err = relock.Process(pid, lost, func(while func() error) error {
			if err := cgroup.Move(pid, apart); err != nil {
				return err
			}
			return errclass.Join(while(), cgroup.Move(pid, tree))
		})
		if err != nil {
			return fmt.Errorf("restore the file locks of process %d in the container: %w", inner[len(inner)-1], err)
		}
		log.G(ctx).WithField("container", c.ID).WithField("locks", len(lost)).Debug("locks of mapped files are restored")
	}
	if !moved {
		return nil
	}
	// A thread that is let go passes from one stop to the other.
	return errclass.Join(cgroup.Hold(ctx, tree), cgroup.Remove(ctx, apart))
}
