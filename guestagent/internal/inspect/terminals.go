// SPDX-License-Identifier: Apache-2.0

package inspect

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
)

// terminalKey is CRIU's key of a terminal that it does not create itself, of the
// device's and its file system's number. It formats both in hexadecimal
// (criu/tty.c, tty_d_name).
func terminalKey(rdev, dev uint64) string { return fmt.Sprintf("tty[%x:%x]", rdev, dev) }

// The major numbers of slave terminals (linux/major.h).
const (
	firstSlaveMajor = 136 // UNIX98_PTY_SLAVE_MAJOR
	lastSlaveMajor  = 143
)

// CheckTerminals finds processes that an exec has left at its terminal: CRIU finds
// neither the terminal's file nor its other end. Stdio is what the kata-agent
// gave to init.
func (c *Container) CheckTerminals(stdio []*api.Stdio) (findings []Finding) {
	members := make(map[int]bool, len(c.Processes))
	for _, p := range c.Processes {
		members[p.PID] = true
	}
	for _, p := range c.Processes {
		switch {
		case p.Terminal != 0 && !members[p.Session] && !isStdio(p.Terminal, stdio):
			findings = append(findings, c.finding(p, attached))
		case slices.ContainsFunc(p.Files, func(f File) bool {
			key := c.foreignTerminal(p, f)
			return key != "" && !slices.ContainsFunc(stdio, func(s *api.Stdio) bool { return s.GetKey() == key })
		}):
			findings = append(findings, c.finding(p, left))
		}
	}
	return findings
}

// attached is a process that belongs to a session whose leader is not in the
// image set (criu/tty.c, dump_verify_tty_sids).
var attached = rule{Refused, errcode.ExecTerminal, "was started by an exec and is attached to the exec's terminal, which CRIU cannot checkpoint", endExec}

// left is a process that has the terminal of an exec open, which may have ended.
var left = rule{Refused, errcode.ExecTerminal, "was started by an exec and has the exec's terminal open, which CRIU cannot checkpoint",
	"terminate it, or start it with its input and output redirected"}

// foreignTerminal returns the key of a slave terminal on a file system that is
// not mounted in the container, or "".
func (c *Container) foreignTerminal(p *Process, f File) string {
	name := strings.TrimSuffix(f.Name, deletedSuffix)
	if !strings.HasPrefix(name, "/") || strings.Trim(path.Base(name), "0123456789") != "" || c.mounts.mountOf(f) != nil {
		return ""
	}
	// What the kernel knows of it, whatever file system it is on.
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, fmt.Sprintf("/proc/%d/fd/%d", p.PID, f.FD), unix.AT_STATX_DONT_SYNC, 0, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFCHR {
		return "" // closed or exited meanwhile, or a file of such a name
	}
	if st.Rdev_major < firstSlaveMajor || st.Rdev_major > lastSlaveMajor {
		return ""
	}
	return terminalKey(unix.Mkdev(st.Rdev_major, st.Rdev_minor), unix.Mkdev(st.Dev_major, st.Dev_minor))
}
