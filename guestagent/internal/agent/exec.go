package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/cgroup"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/criu"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/enter"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/exechelper"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/procfs"
	"github.com/kata-checkpoint/kata-checkpoint/internal/thread"
)

// helperTimeout bounds the wait for an exec helper that Kata has started.
const helperTimeout = 10 * time.Second

// Pauses between two looks for a helper: while something will tell of it, and
// where nothing will.
const (
	rareLooks     = 100 * time.Millisecond
	frequentLooks = 5 * time.Millisecond
)

// Exec implements the service.
func (a *Agent) Exec(ctx context.Context, r *api.ExecRequest) (*api.ExecResponse, error) {
	c, err := a.running(r.GetContainerId())
	if err != nil {
		return nil, errclass.ToRPC(err)
	}
	if c.Restored == nil {
		return nil, errclass.ToRPC(fmt.Errorf("container %s is not a restored one: %w", c.ID, errdefs.ErrFailedPrecondition))
	}
	pid, err := a.exec(ctx, c, r)
	if err != nil {
		return nil, errclass.ToRPC(fmt.Errorf("exec in container %s: %w", c.ID, err))
	}
	return &api.ExecResponse{Pid: int32(pid)}, nil //nolint:gosec // a pid
}

// exec has the process enter the container while Kata starts the helper.
func (a *Agent) exec(ctx context.Context, c *container, r *api.ExecRequest) (int, error) {
	entered, err := a.spawner.Enter(enter.Request{Target: c.Restored.PID, Cgroup: c.tree(), Process: r.GetProcess()})
	if err != nil {
		return 0, err
	}
	defer entered.Close()
	h, err := findHelper(ctx, c, r.GetHelperToken())
	if err != nil {
		return 0, err
	}
	pid, err := entered.Run(h.stdio)
	if err != nil {
		return 0, errors.Join(err, h.kill(), h.close())
	}
	go h.attend(pid)
	return pid, nil
}

// spawnCommand starts the spawner from the agent's copy in memory: what a fork
// of it needs is never read from the share.
func (a *Agent) spawnCommand() (*exec.Cmd, error) {
	if _, err := a.criu.version(); err != nil { // which loads the copy
		return nil, err
	}
	cmd := exec.Command(criu.Agent, SpawnMode)
	cmd.Dir = "/"
	return cmd, nil
}

// helper is an exec helper that Kata has started in a placeholder's namespaces,
// and what the agent has taken from it, all of it descriptors.
type helper struct {
	pidfd  int
	stdio  [3]int
	status int
	// watch is what it was found by. The kernel takes its time to close one.
	watch int
}

// findHelper waits for the exec helper with the token and takes its descriptors.
func findHelper(ctx context.Context, c *container, token string) (*helper, error) {
	ctx, cancel := context.WithTimeout(ctx, helperTimeout)
	defer cancel()
	pause := rareLooks
	watch, err := watchReady()
	if err != nil {
		log.G(ctx).WithError(err).Debug("watch for exec helpers")
		watch, pause = -1, frequentLooks
	}
	h, err := awaitHelper(ctx, c, token, watch, pause)
	if err != nil {
		closeIfOpen(watch)
		return nil, err
	}
	h.watch = watch
	return h, nil
}

func awaitHelper(ctx context.Context, c *container, token string, watch int, pause time.Duration) (*helper, error) {
	for {
		pids, err := cgroup.Procs(c.Cgroup, false)
		if err != nil {
			return nil, fmt.Errorf("look for the exec helper: %w", err)
		}
		for _, pid := range pids {
			if pid == c.Init.PID {
				continue
			}
			if h := takeHelper(c, pid, token); h != nil {
				return h, nil
			}
		}
		told, err := awaitReady(watch, pause)
		if err != nil {
			return nil, fmt.Errorf("watch for the exec helper: %w", err)
		}
		if ctx.Err() != nil {
			return nil, fmt.Errorf("the exec helper did not start: %w", ctx.Err())
		}
		if !told && !c.root().alive() {
			return nil, fmt.Errorf("the process of the container has ended: %w", errdefs.ErrNotFound)
		}
	}
}

// watchReady gives a descriptor that tells when somebody has opened and closed
// the agent's copy in memory, which [remountHelper] has made the helper's: a
// helper does when it has all that is to be taken from it. This is no more
// than a reason to look: where the helper is another file, nothing is told.
func watchReady() (int, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return -1, err
	}
	if _, err := unix.InotifyAddWatch(fd, criu.Agent, unix.IN_CLOSE_NOWRITE); err != nil {
		unix.Close(fd)
		return -1, &os.PathError{Op: "watch", Path: criu.Agent, Err: err}
	}
	return fd, nil
}

// awaitReady waits for a watch to tell something, for some time.
func awaitReady(fd int, pause time.Duration) (told bool, err error) {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}} //nolint:gosec // a descriptor
	n, err := unix.Poll(fds, int(pause.Milliseconds()))
	if n > 0 {
		var events [unix.SizeofInotifyEvent + unix.PathMax]byte
		_, err = unix.Read(fd, events[:])
	}
	if errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN) {
		err = nil
	}
	return n > 0, err
}

// takeHelper returns nil when a process is not the helper, or not ready yet.
// What it looks at a container cannot fake: the helper runs in the
// placeholder's cgroup and namespaces, where no process of the container is,
// from the placeholder's own read-only executable.
func takeHelper(c *container, pid int, token string) *helper {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil
	}
	h := &helper{pidfd: pidfd, stdio: [3]int{-1, -1, -1}, status: -1, watch: -1}
	if !isHelper(c, pid, token) || !h.take() {
		_ = h.close()
		return nil
	}
	return h
}

func isHelper(c *container, pid int, token string) bool {
	args, err := procfs.Cmdline(pid)
	if err != nil || token == "" || len(args) != 3 || args[1] != api.ExecMode || args[2] != token {
		return false
	}
	for _, ns := range []string{"pid", "mnt"} {
		if same, err := procfs.SameNamespace(pid, c.Init.PID, ns); err != nil || !same {
			return false
		}
	}
	exe, err := os.Stat(fmt.Sprintf("/proc/%d/exe", pid))
	if err != nil {
		return false
	}
	for _, ours := range []string{criu.Agent, fmt.Sprintf("/proc/%d/exe", c.Init.PID)} {
		if st, err := os.Stat(ours); err == nil && os.SameFile(st, exe) {
			return true
		}
	}
	return false
}

// placeholderPath is where the placeholder has its binary, which is the exec
// helper's, too.
func placeholderPath(placeholder int) (string, error) {
	cmd, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", placeholder))
	if err != nil {
		return "", err
	}
	path, _, _ := strings.Cut(string(cmd), "\x00")
	return path, nil
}

// remountHelper mounts the copy of the agent's binary that is in memory over
// the one from the share that the placeholder was started from: each exec
// opens the file, and virtiofs would read it anew each time.
func remountHelper(placeholder int) error {
	path, err := placeholderPath(placeholder)
	if err != nil {
		return err
	}
	return thread.Do(func() error {
		fd, err := unix.OpenTree(unix.AT_FDCWD, criu.Agent, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
		if err != nil {
			return fmt.Errorf("clone %s: %w", criu.Agent, err)
		}
		defer unix.Close(fd)
		attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV, Propagation: unix.MS_PRIVATE}
		if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr); err != nil {
			return fmt.Errorf("make the exec helper read-only: %w", err)
		}
		if err := thread.Enter(placeholder, "mnt"); err != nil {
			return err
		}
		if err := unix.MoveMount(fd, "", unix.AT_FDCWD, path, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
			return fmt.Errorf("mount %s: %w", path, err)
		}
		return nil
	})
}

// take copies the helper's descriptors. The last one is there once it is ready.
func (h *helper) take() bool {
	var err error
	if h.status, err = unix.PidfdGetfd(h.pidfd, exechelper.StatusFD, 0); err != nil {
		return false
	}
	for i := range h.stdio {
		if h.stdio[i], err = unix.PidfdGetfd(h.pidfd, i, 0); err != nil {
			return false
		}
	}
	return true
}

// release closes what is of no use once the process runs.
func (h *helper) release() {
	for _, fd := range []*int{&h.stdio[0], &h.stdio[1], &h.stdio[2], &h.watch} {
		closeIfOpen(*fd)
		*fd = -1
	}
}

func (h *helper) close() error {
	h.release()
	closeIfOpen(h.status)
	return unix.Close(h.pidfd)
}

func closeIfOpen(fd int) {
	if fd >= 0 {
		unix.Close(fd)
	}
}

func (h *helper) kill() error {
	err := unix.PidfdSendSignal(h.pidfd, unix.SIGKILL, nil, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	return err
}

// attend tells the helper the process's pid and, when it ends, its status. A
// helper that was killed takes the process with it.
func (h *helper) attend(pid int) {
	defer h.close()
	ws, err := h.await(pid)
	if err == nil {
		err = h.tell(exechelper.Message{PID: int32(pid), Ended: 1, Status: uint32(ws)}) //nolint:gosec // a pid
	}
	if err != nil {
		log.L.WithError(err).WithField("pid", pid).Debug("attend to an exec'd process")
	}
}

// await returns the wait status of the process.
func (h *helper) await(pid int) (unix.WaitStatus, error) {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return 0, fmt.Errorf("watch process %d: %w", pid, err)
	}
	defer unix.Close(pidfd)
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}, {Fd: int32(h.pidfd), Events: unix.POLLIN}} //nolint:gosec // descriptors
	if err := h.introduce(pid); err != nil {
		log.L.WithError(err).WithField("pid", pid).Warn("an exec'd process is ended: it has lost its helper")
		_ = unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0) // gone already, or killed
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
			_ = unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0) // gone already, or killed
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
func (h *helper) introduce(pid int) error {
	// Looked up first: a process that has ended is a zombie until it is waited for.
	pids, err := procfs.NSPIDs(pid)
	if err != nil {
		return err
	}
	if len(pids) < 2 {
		return fmt.Errorf("process %d is in no nested pid namespace", pid)
	}
	// From the guest's root namespace inwards: the second is the placeholder's.
	return h.tell(exechelper.Message{PID: int32(pids[1])}) //nolint:gosec // a pid
}

// tell writes a message, which is less than what a pipe takes in one piece. A
// helper that has gone is no news to who writes: that shows by its pidfd.
func (h *helper) tell(m exechelper.Message) error {
	_, err := unix.Write(h.status, m.Encode())
	return err
}
