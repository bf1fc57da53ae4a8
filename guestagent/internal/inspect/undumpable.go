package inspect

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/procfs"
)

// Undumpable names what CRIU is known to refuse, before it starts: its own
// message comes late, and from deep within its log. The processes need not be
// frozen: then it tells only what can be known of them while they run.
func Undumpable(root int, pids []int, stdio []*api.Stdio, o *api.CheckpointOptions) error {
	own, err := OwnPIDNamespace(root)
	if err != nil {
		return err
	}
	if !own {
		if err := strayed(root, pids); err != nil {
			return err
		}
	}
	return undumpableFiles(root, pids, stdio, o)
}

// strayed refuses processes that have lost their parent in a pid namespace that
// is not their container's own. They are children of that namespace's first
// process then, and CRIU, which goes from a root downwards, leaves them out.
func strayed(root int, pids []int) error {
	for _, pid := range pids {
		if pid == root {
			continue
		}
		stat, err := procfs.ReadStat(pid)
		if err != nil || stat.Parent == 0 {
			continue // ended meanwhile
		}
		if same, err := procfs.SameNamespace(stat.Parent, root, "pid"); err != nil || !same {
			continue // an exec: its parent is Kata's agent
		}
		if first, err := OwnPIDNamespace(stat.Parent); err != nil || !first {
			continue
		}
		return errclass.Precondition("the process %s has lost its parent and is no child of the container's first process, which is where CRIU looks for processes: "+
			"have that adopt such ones, as an init program does that is told to be a subreaper, or run the container with a pid namespace of its own (shareProcessNamespace: false)", named(pid))
	}
	return nil
}

// undumpableFiles looks at what processes have open.
func undumpableFiles(root int, pids []int, stdio []*api.Stdio, o *api.CheckpointOptions) error {
	sockets := make(map[uint32]int) // a socket's inode, and a process that has it
	for _, pid := range pids {
		fds, err := descriptors(pid)
		if err != nil {
			return err
		}
		for _, link := range fds {
			if err := undumpableFile(pid, link, stdio); err != nil {
				return err
			}
			if inode, ok := socketInode(link); ok {
				sockets[inode] = pid
			}
		}
	}
	if o.GetExternalUnixSockets() || len(sockets) == 0 {
		return nil
	}
	return outsideSockets(root, pids, sockets)
}

// descriptors lists what a process has open, as /proc names it. Of a process
// that has ended meanwhile there is nothing.
func descriptors(pid int) ([]string, error) {
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil {
		return nil, err
	}
	var out []string
	for _, fd := range fds {
		link, err := os.Readlink(fd)
		if err != nil {
			continue // closed or ended meanwhile
		}
		out = append(out, link)
	}
	return out, nil
}

func undumpableFile(pid int, link string, stdio []*api.Stdio) error {
	switch {
	case link == "anon_inode:[io_uring]":
		return errclass.Precondition("the process %s uses io_uring, which CRIU cannot checkpoint: run the program without io_uring", named(pid))
	// CRIU finds a /dev/tty's terminal among those that the container has both
	// ends of only (criu/tty.c, tty_verify_ctty).
	case link == "/dev/tty" && controlledBy(pid, stdio):
		return errclass.Precondition("the process %s holds /dev/tty open, as shells with job control do, which CRIU cannot checkpoint with a container's own terminal: end it or run the container without a terminal", named(pid))
	}
	return nil
}

// outsideSockets finds a unix socket of the container that is connected to a
// process outside of it. A peer that no process has is none: it may be on its
// way through another socket, and CRIU knows better.
func outsideSockets(root int, pids []int, sockets map[uint32]int) error {
	peers, err := unixPeers(root)
	if errors.Is(err, os.ErrNotExist) {
		return nil // the guest's kernel cannot tell, and CRIU will say so
	}
	if err != nil {
		return fmt.Errorf("unix sockets of the container: %w", err)
	}
	outside := make(map[uint32]int) // the outer end's inode, and a process that has the inner one
	for inode, pid := range sockets {
		if peer := peers[inode]; peer != 0 && sockets[peer] == 0 {
			outside[peer] = pid
		}
	}
	if len(outside) == 0 {
		return nil
	}
	other, inner := holder(outside, pids)
	if other == 0 {
		return nil
	}
	return errclass.Precondition("the process %s has a unix socket that is connected to outside of the container, to the process %s: close the connection before the checkpoint",
		named(inner), named(other))
}

// holder looks for a process, not among those left out, that has one of the sockets.
func holder(sockets map[uint32]int, leftOut []int) (pid, inner int) {
	skip := make(map[int]bool, len(leftOut))
	for _, pid := range leftOut {
		skip[pid] = true
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return 0, 0
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || skip[pid] {
			continue
		}
		fds, err := descriptors(pid)
		if err != nil {
			continue
		}
		for _, link := range fds {
			if inode, ok := socketInode(link); ok && sockets[inode] != 0 {
				return pid, sockets[inode]
			}
		}
	}
	return 0, 0
}

// socketInode reads a descriptor's name in /proc, socket:[INODE].
func socketInode(link string) (uint32, bool) {
	rest, ok := strings.CutPrefix(link, "socket:[")
	if !ok {
		return 0, false
	}
	// The kernel's interface for sockets has 32 bits for it.
	n, err := strconv.ParseUint(strings.TrimSuffix(rest, "]"), 10, 32)
	return uint32(n), err == nil && n != 0
}

// named names a process for a message.
func named(pid int) string {
	return fmt.Sprintf("%s (pid %d in the guest)", procfs.FirstLine(fmt.Sprintf("/proc/%d/comm", pid)), pid)
}

// controlledBy says whether a process's controlling terminal is one of these.
func controlledBy(pid int, stdio []*api.Stdio) bool {
	stat, err := procfs.ReadStat(pid)
	if err != nil || stat.Terminal == 0 {
		return false
	}
	for _, s := range stdio {
		var rdev, dev uint64
		if _, err := fmt.Sscanf(s.GetKey(), "tty[%x:%x]", &rdev, &dev); err == nil && rdev == stat.Terminal {
			return true
		}
	}
	return false
}
