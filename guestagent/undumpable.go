package guestagent

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"github.com/containerd/errdefs"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/api"
)

// undumpable names what CRIU is known to refuse, before it starts: its own
// message comes late, and from deep within its log.
func undumpable(pids []int, stdio []*api.Stdio) error {
	for _, pid := range pids {
		fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
		if err != nil {
			return err
		}
		for _, fd := range fds {
			link, err := os.Readlink(fd)
			if err != nil {
				continue // closed or ended meanwhile
			}
			if link == "anon_inode:[io_uring]" {
				comm := firstLine(fmt.Sprintf("/proc/%d/comm", pid))
				return fmt.Errorf("the process %s (pid %d in the guest) uses io_uring, which CRIU cannot checkpoint: run the program without io_uring (%w)", comm, pid, errdefs.ErrFailedPrecondition)
			}
			// CRIU finds a /dev/tty's terminal among those that the container has both
			// ends of only (criu/tty.c, tty_verify_ctty).
			if link == "/dev/tty" && controlledBy(pid, stdio) {
				comm := firstLine(fmt.Sprintf("/proc/%d/comm", pid))
				return fmt.Errorf("the process %s (pid %d in the guest) holds /dev/tty open, as shells with job control do, which CRIU cannot checkpoint with a container's own terminal: end it or run the container without a terminal (%w)", comm, pid, errdefs.ErrFailedPrecondition)
			}
		}
	}
	return nil
}

// controlledBy says whether a process's controlling terminal is one of these.
func controlledBy(pid int, stdio []*api.Stdio) bool {
	fields, err := statFields(pid)
	if err != nil || len(fields) < 5 {
		return false
	}
	tty, err := strconv.ParseUint(fields[4], 10, 64)
	if err != nil || tty == 0 {
		return false
	}
	for _, s := range stdio {
		var rdev, dev uint64
		if _, err := fmt.Sscanf(s.GetKey(), "tty[%x:%x]", &rdev, &dev); err == nil && rdev == tty {
			return true
		}
	}
	return false
}
