// SPDX-License-Identifier: Apache-2.0

package exechelper

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/cgroup"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/criu"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/pidfd"
	"github.com/kata-checkpoint/kata-checkpoint/internal/procfs"
)

// timeout bounds the wait for a helper that Kata is asked to start at the same
// time, which takes seconds in a busy VM.
const timeout = time.Minute

// Pauses between two looks for a helper: with an inotify watch, and without.
const (
	rareLooks     = 100 * time.Millisecond
	frequentLooks = 5 * time.Millisecond
)

// Placeholder is where Kata starts a container's helpers.
type Placeholder struct {
	PID int
	// Cgroup is the directory of its cgroup.
	Cgroup string
	// File is what [Mount] returned.
	File FileID
	// Alive reports whether the container still runs.
	Alive func() bool
}

// Helper is an exec helper that Kata has started, and what the agent has taken
// from it, all of it descriptors.
type Helper struct {
	// Stdio are copies of the helper's descriptors 0 to 2.
	Stdio [3]int

	pid    int
	pidfd  int
	status int
	// watch is what it was found by. It takes the kernel a while to close one.
	watch int
}

// Find waits for the helper with a token and takes its descriptors. The caller
// calls [Helper.Attend] or [Helper.Kill].
func Find(ctx context.Context, p Placeholder, token string) (*Helper, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	pause := rareLooks
	watch, err := watchReady()
	if err != nil {
		log.G(ctx).WithError(err).Debug("failed to watch for exec helpers")
		watch, pause = -1, frequentLooks
	}
	h, err := p.await(ctx, token, watch, pause)
	if err != nil {
		closeIfOpen(watch)
		return nil, err
	}
	h.watch = watch
	return h, nil
}

func (p Placeholder) await(ctx context.Context, token string, watch int, pause time.Duration) (*Helper, error) {
	for {
		pids, err := cgroup.Procs(p.Cgroup, false)
		if err != nil {
			return nil, fmt.Errorf("look for the exec helper: %w", err)
		}
		for _, pid := range pids {
			if pid == p.PID {
				continue
			}
			if h := p.take(pid, token); h != nil {
				return h, nil
			}
		}
		told, err := awaitReady(watch, pause)
		if err != nil {
			return nil, fmt.Errorf("watch for the exec helper: %w", err)
		}
		if ctx.Err() != nil {
			return nil, errcode.ExecFailed.Errorf("the exec helper did not start: %w", ctx.Err())
		}
		if !told && !p.Alive() {
			return nil, errcode.ProcessExited.Errorf("the process of the container has ended: %w", errdefs.ErrNotFound)
		}
	}
}

// watchReady returns an inotify descriptor for when somebody has opened and
// closed the helper's file, as a helper does once it has all that is to be
// taken from it. This is a reason to look, and proves nothing.
func watchReady() (int, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return -1, err
	}
	if _, err := unix.InotifyAddWatch(fd, criu.Helper, unix.IN_CLOSE_NOWRITE); err != nil {
		unix.Close(fd)
		return -1, &os.PathError{Op: "watch", Path: criu.Helper, Err: err}
	}
	return fd, nil
}

// awaitReady waits for an event of the watch, at most for a pause.
func awaitReady(watch int, pause time.Duration) (told bool, err error) {
	fds := []unix.PollFd{{Fd: int32(watch), Events: unix.POLLIN}} //nolint:gosec // a descriptor
	n, err := unix.Poll(fds, int(pause.Milliseconds()))
	if n > 0 {
		var events [unix.SizeofInotifyEvent + unix.PathMax]byte
		_, err = unix.Read(watch, events[:])
	}
	if errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN) {
		err = nil
	}
	return n > 0, err
}

// take returns nil when a process is not the helper, or not ready yet. What it
// looks at a container cannot fake: the helper is in the placeholder's cgroup
// and namespaces, where no process of the container is, and executes the file
// that the agent has mounted there.
func (p Placeholder) take(pid int, token string) *Helper {
	fd, err := pidfd.Open(pid)
	if err != nil {
		return nil
	}
	h := &Helper{pid: pid, pidfd: fd, Stdio: [3]int{-1, -1, -1}, status: -1, watch: -1}
	if !p.isHelper(pid, token) || !h.take() {
		_ = h.close()
		return nil
	}
	return h
}

func (p Placeholder) isHelper(pid int, token string) bool {
	args, err := procfs.Cmdline(pid)
	if err != nil || token == "" || len(args) != 3 || args[1] != api.ExecMode || args[2] != token {
		return false
	}
	for _, ns := range []string{"pid", "mnt"} {
		if same, err := procfs.SameNamespace(pid, p.PID, ns); err != nil || !same {
			return false
		}
	}
	file, err := identify(fmt.Sprintf("/proc/%d/exe", pid))
	return err == nil && file == p.File
}

// take copies the helper's descriptors. The first one is there once it is ready.
func (h *Helper) take() bool {
	var err error
	if h.status, err = unix.PidfdGetfd(h.pidfd, StatusFD, 0); err != nil {
		return false
	}
	for i := range h.Stdio {
		if h.Stdio[i], err = unix.PidfdGetfd(h.pidfd, i, 0); err != nil {
			return false
		}
	}
	return true
}

// release closes what is not needed once the process runs.
func (h *Helper) release() {
	for _, fd := range []*int{&h.Stdio[0], &h.Stdio[1], &h.Stdio[2], &h.watch} {
		closeIfOpen(*fd)
		*fd = -1
	}
}

func (h *Helper) close() error {
	h.release()
	closeIfOpen(h.status)
	return unix.Close(h.pidfd)
}

func closeIfOpen(fd int) {
	if fd >= 0 {
		unix.Close(fd)
	}
}

// Kill ends a helper that has no process.
func (h *Helper) Kill() error {
	return errclass.Join(pidfd.Kill(h.pidfd), h.close())
}
