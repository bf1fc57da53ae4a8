// SPDX-License-Identifier: Apache-2.0

// Package thread runs functions in other namespaces. Namespaces belong to
// threads, and Go moves goroutines between threads, so each such function gets
// a thread of its own, which exits with it.
//
// Written against Go 1.26, whose runtime ends the thread of a goroutine that
// exits locked to it, except for the main thread.
package thread

import (
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

// Do runs fn on a thread that is discarded afterwards, so that fn may change
// the thread's namespaces, root and working directory.
//
// It is never the main thread, whose namespaces are those that /proc/PID shows,
// and which Go cannot end: it would stay in fn's namespaces for the rest of the
// process's life.
func Do(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// Locked to this goroutine, the main thread cannot be chosen again.
			err := Do(fn)
			runtime.UnlockOSThread()
			done <- err
			return
		}
		// Never unlocked: the thread exits with the goroutine.
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			done <- fmt.Errorf("unshare file system state: %w", err)
			return
		}
		done <- fn()
	}()
	return <-done
}

// Enter moves the calling thread into namespaces of a process. It must be a
// thread of [Do], or a locked main thread that has unshared its file system
// state.
func Enter(pid int, namespaces ...string) error {
	for _, ns := range namespaces {
		path := fmt.Sprintf("/proc/%d/ns/%s", pid, ns)
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open namespace %s: %w", path, err)
		}
		err = unix.Setns(fd, 0)
		unix.Close(fd)
		if err != nil {
			return fmt.Errorf("enter namespace %s: %w", path, err)
		}
	}
	return nil
}
