// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// reaper waits for every child of PID 1, started or inherited. Nothing else in
// the agent may wait for a process.
type reaper struct {
	mu      sync.Mutex
	waiting map[int]chan uint32
	// orphans are exit statuses that nobody has asked for yet: a process may
	// exit before its pid is known.
	orphans map[int]orphan
}

type orphan struct {
	status uint32
	at     time.Time
}

// orphanLife is how long an exit status is kept. Pids are reused much later.
const orphanLife = 30 * time.Second

func newReaper() *reaper {
	return &reaper{waiting: map[int]chan uint32{}, orphans: map[int]orphan{}}
}

// run reaps until the guest stops.
func (r *reaper) run() {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGCHLD)
	for {
		r.reap()
		<-signals
	}
}

func (r *reaper) reap() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, unix.WNOHANG, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil || pid <= 0 {
			return
		}
		code := uint32(status.ExitStatus())
		if status.Signaled() {
			code = 128 + uint32(status.Signal())
		}
		if c, ok := r.waiting[pid]; ok {
			delete(r.waiting, pid)
			c <- code
			continue
		}
		now := time.Now()
		for other, o := range r.orphans {
			if now.Sub(o.at) > orphanLife {
				delete(r.orphans, other)
			}
		}
		r.orphans[pid] = orphan{code, now}
	}
}

// start starts a command whose streams are files, and returns the channel of
// its exit status. The command must not be waited for in any other way.
func (r *reaper) start(cmd *exec.Cmd) (<-chan uint32, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	c, pid := make(chan uint32, 1), cmd.Process.Pid
	r.waiting[pid] = c
	// Otherwise the pidfd would stay open until garbage collection.
	_ = cmd.Process.Release()
	cmd.Process.Pid = pid // which Release forgets
	return c, nil
}

// watch returns the channel of the exit status of a process that is, or just
// was, a descendant.
func (r *reaper) watch(pid int) <-chan uint32 {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := make(chan uint32, 1)
	if o, ok := r.orphans[pid]; ok {
		delete(r.orphans, pid)
		if time.Since(o.at) <= orphanLife {
			c <- o.status
			return c
		}
	}
	r.waiting[pid] = c
	return c
}

// runCommand runs a command; if it fails, its output is part of the error.
func (r *reaper) runCommand(cmd *exec.Cmd) error {
	read, write, err := os.Pipe()
	if err != nil {
		return err
	}
	defer read.Close()
	if cmd.Stdout == nil {
		cmd.Stdout = write
	}
	if cmd.Stderr == nil {
		cmd.Stderr = write
	}
	status, err := r.start(cmd)
	write.Close()
	if err != nil {
		return fmt.Errorf("%s: %w", cmd.Path, err)
	}
	var output bytes.Buffer
	_, _ = io.Copy(&output, read)
	if code := <-status; code != 0 {
		return fmt.Errorf("%s: exit status %d: %s", cmd.Path, code, bytes.TrimSpace(output.Bytes()))
	}
	return nil
}
