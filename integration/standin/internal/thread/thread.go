// SPDX-License-Identifier: Apache-2.0

// Package thread runs code in other namespaces. Namespaces belong to threads,
// and Go moves goroutines between threads, so that such code gets a thread of
// its own, which exits afterwards.
package thread

import (
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

// Do runs fn on a thread that exits afterwards, so that fn may change the
// thread's namespaces, root and working directory.
//
// That thread is never the main thread, whose namespaces /proc/PID shows and
// which Go cannot end: it would stay in fn's namespaces for the rest of the
// process's life.
func Do(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// While it is locked here, the main thread cannot be chosen again.
			err := Do(fn)
			runtime.UnlockOSThread()
			done <- err
			return
		}
		// Never unlocked: the thread ends with the goroutine.
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			done <- fmt.Errorf("unshare file system state: %w", err)
			return
		}
		done <- fn()
	}()
	return <-done
}
