// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// initMounts are the mounts that the agent creates as PID 1, in Kata's order
// (src/agent/src/mount.rs).
var initMounts = []struct {
	kind, source, target string
	flags                uintptr
	options              string
}{
	{"proc", "proc", "/proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
	{"sysfs", "sysfs", "/sys", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
	{"devtmpfs", "dev", "/dev", unix.MS_NOSUID, ""},
	{"tmpfs", "tmpfs", "/dev/shm", unix.MS_NOSUID | unix.MS_NODEV, ""},
	{"devpts", "devpts", "/dev/pts", unix.MS_NOSUID | unix.MS_NOEXEC, ""},
	{"tmpfs", "tmpfs", "/run", unix.MS_NOSUID | unix.MS_NODEV, ""},
	{"cgroup2", "cgroup2", "/sys/fs/cgroup", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_RELATIME, "nsdelegate"},
}

// Boot sets the guest's root up. Mounts inherit the propagation of /, which the
// guest determines.
func Boot() error {
	for _, m := range initMounts {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return fmt.Errorf("boot: %w", err)
		}
		if err := unix.Mount(m.source, m.target, m.kind, m.flags, m.options); err != nil {
			return fmt.Errorf("boot: mount %s: %w", m.target, err)
		}
	}
	for link, target := range map[string]string{
		"/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0", "/dev/stdout": "/proc/self/fd/1", "/dev/stderr": "/proc/self/fd/2",
	} {
		if err := os.Symlink(target, link); err != nil && !os.IsExist(err) {
			return fmt.Errorf("boot: %w", err)
		}
	}
	if err := os.MkdirAll("/tmp", 0o1777); err != nil {
		return fmt.Errorf("boot: %w", err)
	}
	if err := unix.Sethostname([]byte("localhost")); err != nil {
		return fmt.Errorf("boot: set the host name: %w", err)
	}
	return bringUp("lo")
}

// inInitramfs reports whether the guest's root is the initramfs, out of which
// nobody can pivot (src/agent/src/sandbox.rs, no_pivot_root).
func inInitramfs() bool {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(mounts)) {
		if fields := strings.Fields(line); len(fields) > 2 && fields[1] == "/" {
			return fields[2] == "rootfs"
		}
	}
	return false
}

func bringUp(name string) error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("bring %s up: %w", name, err)
	}
	defer unix.Close(s)
	request, err := unix.NewIfreq(name)
	if err != nil {
		return fmt.Errorf("bring %s up: %w", name, err)
	}
	if err := unix.IoctlIfreq(s, unix.SIOCGIFFLAGS, request); err != nil {
		return fmt.Errorf("bring %s up: %w", name, err)
	}
	request.SetUint16(request.Uint16() | unix.IFF_UP)
	if err := unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, request); err != nil {
		return fmt.Errorf("bring %s up: %w", name, err)
	}
	return nil
}
