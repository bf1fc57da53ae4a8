// SPDX-License-Identifier: Apache-2.0

package share

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// bind bind-mounts source on target, non-recursively as Kata does. The target
// is created as a file or a directory like the source.
func bind(source, target string, propagation uintptr) error {
	info, err := os.Stat(source)
	if err != nil {
		return err
	}
	if info.IsDir() {
		err = os.MkdirAll(target, 0o750)
	} else {
		err = touch(target)
	}
	if err != nil {
		return err
	}
	if err := unix.Mount(source, target, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind %s on %s: %w", source, target, err)
	}
	if err := unix.Mount("", target, "", propagation, ""); err != nil {
		return fmt.Errorf("set the propagation of %s: %w", target, err)
	}
	return nil
}

func touch(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o640)
	if err != nil {
		return err
	}
	return f.Close()
}

// setReadOnly makes one mount read-only or writable. The other mounts of its
// peer group keep their own flag.
func setReadOnly(path string, on bool) error {
	flags := uintptr(unix.MS_BIND | unix.MS_REMOUNT)
	if on {
		flags |= unix.MS_RDONLY
	}
	if err := unix.Mount("", path, "", flags, ""); err != nil {
		return fmt.Errorf("remount %s: %w", path, err)
	}
	return nil
}

func unmount(path string) error {
	if err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && err != unix.EINVAL && err != unix.ENOENT {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	return nil
}

// Below lists the mount points at and below root in the caller's mount
// namespace, latest first.
func Below(root string) ([]string, error) {
	f, err := os.Open("/proc/thread-self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return mountsBelow(f, root)
}

func mountsBelow(mountinfo io.Reader, root string) ([]string, error) {
	var found []string
	lines := bufio.NewScanner(mountinfo)
	for lines.Scan() {
		if fields := strings.Fields(lines.Text()); len(fields) > 4 {
			if point := unescape(fields[4]); below(point, root) {
				found = append(found, point)
			}
		}
	}
	slices.Reverse(found)
	return found, lines.Err()
}

// unescape decodes mountinfo's octal escapes.
var unescape = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace

// RemoveTree unmounts everything at and below root and removes it. It removes
// nothing while something is mounted there. Kata does, and deletes the content
// of the mount's source.
func RemoveTree(root string) error {
	for range 10 {
		points, err := Below(root)
		if err != nil {
			return fmt.Errorf("list the mounts below %s: %w", root, err)
		}
		if len(points) == 0 {
			return os.RemoveAll(root)
		}
		for _, p := range points {
			if err := unmount(p); err != nil {
				return err
			}
		}
	}
	return fmt.Errorf("%s is still mounted", root)
}
