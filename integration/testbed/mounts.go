// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// mount is a line of /proc/self/mountinfo.
type mount struct {
	path   string
	shared bool
	slave  bool
}

func mounts() ([]mount, error) { return mountsOf("/proc/self/mountinfo") }

func mountsOf(mountinfo string) ([]mount, error) {
	f, err := os.Open(mountinfo)
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	defer f.Close()
	var out []mount
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if m, ok := parseMount(lines.Text()); ok {
			out = append(out, m)
		}
	}
	return out, lines.Err()
}

// parseMount: "36 35 98:0 /root /path options shared:1 master:2 - fstype source
// options", spaces in paths as \040.
func parseMount(line string) (mount, bool) {
	before, _, ok := strings.Cut(line, " - ")
	fields := strings.Fields(before)
	if !ok || len(fields) < 6 {
		return mount{}, false
	}
	m := mount{path: unescape(fields[4])}
	for _, tag := range fields[6:] {
		m.shared = m.shared || strings.HasPrefix(tag, "shared:")
		m.slave = m.slave || strings.HasPrefix(tag, "master:")
	}
	return m, true
}

func unescape(s string) string {
	var out strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				out.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		out.WriteByte(s[i])
	}
	return out.String()
}

// unmountBelow unmounts everything at dir and below, the last mounted first.
func unmountBelow(dir string) error {
	all, err := mounts()
	if err != nil {
		return err
	}
	var errs []error
	for _, a := range slices.Backward(all) {
		path := a.path
		if path != dir && !strings.HasPrefix(path, dir+"/") {
			continue
		}
		if err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) {
			errs = append(errs, fmt.Errorf("unmount %s: %w", path, err))
		}
	}
	return errors.Join(errs...)
}

// removeTree unmounts everything at dir and below, and removes dir. It never
// descends into a mount, which would empty a bind mount's source.
func removeTree(dir string) error {
	if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := unmountBelow(dir); err != nil {
		return err
	}
	all, err := mounts()
	if err != nil {
		return err
	}
	for _, m := range all {
		if m.path == dir || strings.HasPrefix(m.path, dir+"/") {
			return fmt.Errorf("remove %s: %s is still mounted", dir, m.path)
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove: %w", err)
	}
	return nil
}
