// SPDX-License-Identifier: Apache-2.0

package inspect

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
)

// Stdio returns CRIU's keys of the descriptors 0 to 2 of a process whose other
// ends are outside of its container: pipes that the kata-agent created, or a
// terminal of the guest's devpts (src/agent/rustjail/src/process.rs).
func Stdio(pid int) ([]*api.Stdio, error) {
	var out []*api.Stdio
	for fd := range uint32(3) {
		path := fmt.Sprintf("/proc/%d/fd/%d", pid, fd)
		link, err := os.Readlink(path)
		if os.IsNotExist(err) {
			continue // closed
		}
		if err != nil {
			return nil, err
		}
		s := &api.Stdio{Fd: fd}
		switch {
		case strings.HasPrefix(link, "pipe:["):
			s.Key = link
		case strings.HasPrefix(link, "/dev/pts/") || strings.HasPrefix(link, "/pts/"):
			var st unix.Stat_t
			if err := unix.Stat(path, &st); err != nil {
				return nil, &os.PathError{Op: "stat", Path: path, Err: err}
			}
			s.Key = terminalKey(st.Rdev, st.Dev)
		}
		out = append(out, s)
	}
	return out, nil
}

// IsTTY reports whether a key is that of a terminal.
func IsTTY(key string) bool { return strings.HasPrefix(key, "tty[") }
