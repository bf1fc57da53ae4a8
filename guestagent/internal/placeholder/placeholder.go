// SPDX-License-Identifier: Apache-2.0

// Package placeholder is the init of a restored container: Kata starts it in
// place of the container's own program, and CRIU restores the container's
// processes below it, in a nested PID namespace. It reaps children, forwards
// signals, and exits with the status of the restored root, so that Wait, Kill
// and the exit code remain Kata's.
//
// It trusts nothing: its only inputs are signals and the exits of its children.
//
// It relies on how the kata-agent of Kata 4.1.0 delivers signals.
package placeholder

import (
	"errors"
	"os"
	"os/signal"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/procfs"
)

// Run returns when the restored root has exited. It returns the status to exit
// with: that of the root, or 128 plus the signal that killed it.
func Run() int {
	// The restored session needs the terminal as its controlling one. Giving it
	// up sends SIGHUP and SIGCONT to this process's group.
	signal.Ignore(unix.SIGHUP)
	_ = unix.IoctlSetInt(0, unix.TIOCNOTTY, 0) // fails without a terminal
	signals := make(chan os.Signal, 64)
	signal.Notify(signals)
	// The SIGCHLD of a child that exited before Notify was missed: reap first.
	for {
		if status, done := reap(); done {
			return status
		}
		forward((<-signals).(unix.Signal))
	}
}

// reap waits for the children that have exited. It reports done if the restored
// root was among them.
func reap() (status int, done bool) {
	for {
		pid, err := peek()
		if err != nil || pid == 0 {
			return 0, false
		}
		root := isRoot(pid)
		var ws unix.WaitStatus
		for {
			_, err = unix.Wait4(pid, &ws, 0, nil)
			if !errors.Is(err, unix.EINTR) {
				break
			}
		}
		if root && err == nil {
			if ws.Signaled() {
				return 128 + int(ws.Signal()), true
			}
			return ws.ExitStatus(), true
		}
	}
}

// peek returns the PID of a child that has exited, without reaping it: until
// then /proc still describes it.
func peek() (int, error) {
	for {
		var info unix.Siginfo
		err := unix.Waitid(unix.P_ALL, 0, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return siginfoPID(&info), err
	}
}

// isRoot reports whether a child is in a nested PID namespace, as only a
// restored root is: the other processes there are children of the root or of
// the namespace's init.
func isRoot(pid int) bool {
	own, err := procfs.NSPIDs(os.Getpid())
	if err != nil {
		return false
	}
	pids, err := procfs.NSPIDs(pid)
	return err == nil && len(pids) > len(own)
}

// forward forwards a signal to the restored root.
func forward(sig unix.Signal) {
	switch sig {
	case unix.SIGCHLD, unix.SIGURG:
		return // meant for this process only; Go's runtime sends itself SIGURG
	}
	pid, ok := findRoot()
	if !ok {
		return
	}
	// A PID 1 ignores signals from outside that it leaves at their default.
	// Kata turns SIGTERM into SIGKILL for one that does so
	// (src/agent/src/rpc.rs, is_signal_handled), but all it sees is this
	// process, which catches every signal: the rule has to be kept here.
	if sig == unix.SIGTERM && !handles(pid, sig) {
		sig = unix.SIGKILL
	}
	_ = unix.Kill(pid, sig)
}

// findRoot looks for the restored root among this process's children. Right
// after the restore, CRIU may not have exited yet and still be its parent.
func findRoot() (int, bool) {
	for range 50 {
		entries, err := os.ReadDir("/proc")
		if err != nil {
			return 0, false
		}
		for _, e := range entries {
			pid, err := strconv.Atoi(e.Name())
			if err != nil || pid == os.Getpid() {
				continue
			}
			if stat, err := procfs.ReadStat(pid); err == nil && stat.Parent == os.Getpid() && isRoot(pid) {
				return pid, true
			}
		}
		time.Sleep(20 * time.Millisecond) //nolint:forbidigo // the pause between two checks
	}
	return 0, false
}

// handles reports whether a process catches, blocks or ignores a signal. One
// that blocks it may take it by sigwait(3), signalfd(2) or sigpending(2), as
// service managers do.
func handles(pid int, sig unix.Signal) bool {
	for _, field := range []string{"SigCgt", "SigBlk", "SigIgn"} {
		value, err := procfs.Status(pid, field)
		if err != nil {
			return false
		}
		mask, err := strconv.ParseUint(value, 16, 64)
		if err == nil && mask&(1<<(uint(sig)-1)) != 0 {
			return true
		}
	}
	return false
}
