// SPDX-License-Identifier: Apache-2.0

package exechelper

import (
	"errors"
	"fmt"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/pidfd"
	"github.com/kata-checkpoint/kata-checkpoint/internal/procfs"
)

// Attend tells the helper the process's pid and, when it ends, its status, and
// returns then. A helper that was killed takes the process with it.
func (h *Helper) Attend(pid int) {
	defer h.close()
	ws, err := h.await(pid)
	if err == nil {
		err = h.tell(Message{PID: int32(pid), Ended: 1, Status: uint32(ws)}) //nolint:gosec // a pid
	}
	if err != nil {
		log.L.WithError(err).WithField("pid", pid).Debug("failed to report the end of a process to its exec helper")
	}
}

// await returns the wait status of the process.
func (h *Helper) await(pid int) (unix.WaitStatus, error) {
	fd, err := pidfd.Open(pid)
	if err != nil {
		return 0, fmt.Errorf("watch process %d: %w", pid, err)
	}
	defer unix.Close(fd)
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}, {Fd: int32(h.pidfd), Events: unix.POLLIN}} //nolint:gosec // descriptors
	if err := h.introduce(pid); err != nil {
		log.L.WithError(err).WithField("pid", pid).Warn("killed a process that has lost its exec helper")
		_ = pidfd.Kill(fd)
		fds = fds[:1]
	}
	h.release()
	for {
		if _, err := unix.Poll(fds, -1); err != nil && !errors.Is(err, unix.EINTR) {
			return 0, fmt.Errorf("watch process %d: %w", pid, err)
		}
		if fds[0].Revents != 0 {
			break
		}
		if len(fds) > 1 && fds[1].Revents != 0 {
			_ = pidfd.Kill(fd)
			fds = fds[:1]
		}
	}
	var ws unix.WaitStatus
	for {
		_, err := unix.Wait4(pid, &ws, 0, nil)
		if !errors.Is(err, unix.EINTR) {
			return ws, err
		}
	}
}

// introduce tells the helper where to pass signals on to.
func (h *Helper) introduce(pid int) error {
	// Looked up first: a process that has exited is a zombie until it is reaped.
	pids, err := procfs.NSPIDs(pid)
	if err != nil {
		return err
	}
	if len(pids) < 2 {
		return fmt.Errorf("process %d is in no nested PID namespace", pid)
	}
	// From the guest's root namespace inwards: the second is the placeholder's.
	return h.tell(Message{PID: int32(pids[1])}) //nolint:gosec // a pid
}

// tell writes a message, which a pipe takes in one piece. It fails when the
// helper has exited.
func (h *Helper) tell(m Message) error {
	_, err := unix.Write(h.status, m.Encode())
	return err
}
