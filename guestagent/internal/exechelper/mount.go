// SPDX-License-Identifier: Apache-2.0

package exechelper

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/criu"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/inside"
	"github.com/kata-checkpoint/kata-checkpoint/internal/thread"
)

// FileID identifies a file for as long as it is mounted or open somewhere.
type FileID struct {
	Device uint64 `json:"device"`
	Inode  uint64 `json:"inode"`
}

func identify(path string) (FileID, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return FileID{}, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return FileID{uint64(st.Dev), st.Ino}, nil //nolint:unconvert // 32 bits on some architectures
}

// Mount puts the helper where Kata will execute it for an exec: in a
// placeholder's mount namespace, over the binary that the placeholder was
// started from. It is the copy in the guest's memory, read-only; from the share
// each exec would read the file again. Mount returns which file that is.
func Mount(placeholder int) (FileID, error) {
	id, err := identify(criu.Helper)
	if err == nil {
		err = thread.Do(func() error { return mount(placeholder) })
	}
	if err != nil {
		return FileID{}, fmt.Errorf("mount the exec helper: %w", err)
	}
	return id, nil
}

func mount(placeholder int) error {
	fd, err := unix.OpenTree(unix.AT_FDCWD, criu.Helper, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return fmt.Errorf("clone %s: %w", criu.Helper, err)
	}
	defer unix.Close(fd)
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV, Propagation: unix.MS_PRIVATE}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		return fmt.Errorf("make it read-only: %w", err)
	}
	if err := thread.Enter(placeholder, "mnt"); err != nil {
		return err
	}
	root, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: "/", Err: err}
	}
	defer unix.Close(root)
	// Over the binary that Kata has mounted, and nowhere else: the container's image
	// may have links in its path.
	target, err := inside.OpenMountPoint(root, api.HelperPath, 0)
	if err != nil {
		return err
	}
	defer unix.Close(target)
	if err := unix.MoveMount(fd, "", target, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH); err != nil {
		return fmt.Errorf("move to %s: %w", api.HelperPath, err)
	}
	return nil
}
