// SPDX-License-Identifier: Apache-2.0

package kata

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/thread"
)

// writableDirs are where in a sandbox's share Kata's shims mount root file
// systems and volumes: the Rust one in rw, the Go one in mounts. virtiofsd
// serves copies of these mounts, which are beside them.
var writableDirs = []string{"rw", "mounts"}

// Protect makes what Kata's shim shares with the guest of a sandbox read-only,
// for Kata's shim alone. At the end of a sandbox, both of Kata's shims remove
// the share recursively, assuming that nothing is mounted in it any more
// (src/runtime-rs/crates/resource/src/share_fs/virtio_fs_share_mount.rs,
// src/runtime/virtcontainers/fs_share_linux.go). For a container that was
// created and never started, the root file system and the volumes still are:
// their files would be deleted. The guest can still write to them, through
// virtiofsd's copies of the mounts.
//
// pid and pidfd are those of Kata's shim.
func Protect(pidfd, pid int, sandbox string) error {
	return protect(pidfd, pid, filepath.Join(shareDir, filepath.Base(sandbox)))
}

func protect(pidfd, pid int, share string) error {
	f, err := os.Open(fmt.Sprintf("/proc/%d/mountinfo", pid))
	if err != nil {
		return fmt.Errorf("protect what is shared: %w", err)
	}
	defer f.Close()
	mounts, err := mountinfo.GetMountsFromReader(f, nil)
	if err != nil {
		return fmt.Errorf("protect what is shared: mounts of Kata's shim: %w", err)
	}
	var targets []string
	for _, m := range mounts {
		for _, d := range writableDirs {
			if strings.HasPrefix(m.Mountpoint, filepath.Join(share, d)+"/") {
				targets = append(targets, m.Mountpoint)
			}
		}
	}
	if len(targets) == 0 {
		return nil
	}
	err = thread.Do(func() (err error) {
		if err := unix.Setns(pidfd, unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("enter the mount namespace of Kata's shim: %w", err)
		}
		for _, t := range targets {
			err = errclass.Join(err, makeReadOnly(t))
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("protect what is shared: %w", err)
	}
	return nil
}

// makeReadOnly makes a mount read-only, without its file system's other mounts.
// The path may lead through directories that the guest can write to.
func makeReadOnly(path string) error {
	fd, err := unix.Openat2(unix.AT_FDCWD, path, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS})
	if err == nil {
		defer unix.Close(fd)
		attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
		err = unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr)
		if errors.Is(err, unix.ENOSYS) { // before Linux 5.12
			err = unix.Mount("", fmt.Sprintf("/proc/thread-self/fd/%d", fd), "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, "")
		}
	}
	// ENOENT and EINVAL: it is no longer a mount.
	if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("make %s read-only: %w", path, err)
	}
	return nil
}
