// SPDX-License-Identifier: Apache-2.0

package kata

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
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
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
	if err := inNamespace(pidfd, targets, func(fd int) error {
		return setAttr(fd, &attr, unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY)
	}); err != nil {
		return fmt.Errorf("protect what is shared: %w", err)
	}
	return nil
}
