// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"fmt"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// concealed are a container's masked and read-only paths.
type concealed struct {
	masked, readOnly []string
}

// finishMounts does in a container's mount namespace what runc does differently
// from Kata's agent.
func (c *container) finishMounts(hidden concealed) error {
	root, err := unix.Open(filepath.Join(c.bundle, "rootfs"), unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("finish the mounts: %w", err)
	}
	defer unix.Close(root)
	err = inMounts(c.init.pid, func() error {
		if err := followGuest(root); err != nil {
			return fmt.Errorf("follow the guest's root: %w", err)
		}
		return hidden.apply()
	})
	if err != nil {
		return fmt.Errorf("finish the mounts: %w", err)
	}
	return nil
}

// followGuest makes the container's root a slave of the guest's mount of it if
// mounts in the guest are shared. runc makes it private.
func followGuest(root int) error {
	own, err := unix.Open("/", unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(own)
	err = unix.MoveMount(root, "", own, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH|unix.MOVE_MOUNT_SET_GROUP)
	if err == unix.EINVAL {
		return nil // the guest's mounts are private
	}
	if err != nil {
		return err
	}
	return unix.Mount("", "/", "", unix.MS_SLAVE, "")
}

// apply masks files with the container's own null device. Missing paths and
// directories are skipped, as by Kata's agent
// (src/agent/rustjail/src/mount.rs).
func (c concealed) apply() error {
	for _, path := range c.masked {
		if err := unix.Mount("/dev/null", path, "", unix.MS_BIND, ""); err != nil && err != unix.ENOENT && err != unix.ENOTDIR {
			return fmt.Errorf("mask %s: %w", path, err)
		}
	}
	for _, path := range c.readOnly {
		err := unix.Mount(path, path, "", unix.MS_BIND|unix.MS_REC, "")
		if err == unix.ENOENT {
			continue
		}
		if err == nil {
			err = unix.Mount("", path, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, "")
		}
		if err != nil {
			return fmt.Errorf("protect %s: %w", path, err)
		}
	}
	return nil
}
