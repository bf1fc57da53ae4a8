// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"bufio"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// process is a container's init or an exec.
type process struct {
	pid     int
	streams *streams
	stdin   sync.Once
	done    chan struct{}
	status  uint32 // valid once done is closed
}

// follow waits until the process exits.
func (p *process) follow(status <-chan uint32) {
	p.done = make(chan struct{})
	go func() {
		p.status = <-status
		p.streams.drain()
		close(p.done)
	}()
}

// closeStdin closes a process's stdin. A terminal stays open.
func (p *process) closeStdin() {
	if p.streams.terminal == nil {
		p.stdin.Do(func() { p.streams.stdin.Close() })
	}
}

// signal signals only this process. An init that does not handle SIGTERM would
// not get it, as PID 1 of its namespace, and is killed.
func (p *process) signal(signal unix.Signal, first bool) error {
	if first && signal == unix.SIGTERM && !heeds(p.pid, signal) {
		signal = unix.SIGKILL
	}
	if err := unix.Kill(p.pid, signal); err != nil && err != unix.ESRCH {
		return fmt.Errorf("signal process %d: %w", p.pid, err)
	}
	return nil
}

// heeds reports whether a process handles, blocks or ignores a signal.
func heeds(pid int, signal unix.Signal) bool {
	f, err := os.Open(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return false
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if inMask(lines.Text(), signal) {
			return true
		}
	}
	return false
}

// inMask reads one line of /proc/PID/status. Kata's agent treats a blocked or
// ignored signal as handled (src/agent/src/rpc.rs).
func inMask(line string, signal unix.Signal) bool {
	key, value, _ := strings.Cut(line, ":")
	switch key {
	case "SigBlk", "SigIgn", "SigCgt":
		mask, err := strconv.ParseUint(strings.TrimSpace(value), 16, 64)
		return err == nil && mask&(1<<(signal-1)) != 0
	}
	return false
}
