// SPDX-License-Identifier: Apache-2.0

package guest

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/internal/thread"
)

// pinned is the directory of the sandbox-wide namespaces.
const pinned = "/var/run/sandbox-ns"

// pin creates a namespace, bind-mounts it at pinned/NAME, and runs f in it.
func pin(name string, flag int, f func() error) (string, error) {
	path := filepath.Join(pinned, name)
	if err := os.MkdirAll(pinned, 0o755); err != nil {
		return "", fmt.Errorf("pin namespace %s: %w", name, err)
	}
	file, err := os.Create(path)
	if err != nil {
		return "", fmt.Errorf("pin namespace %s: %w", name, err)
	}
	file.Close()
	err = thread.Do(func() error {
		if err := unix.Unshare(flag); err != nil {
			return err
		}
		if err := f(); err != nil {
			return err
		}
		return unix.Mount("/proc/thread-self/ns/"+name, path, "", unix.MS_BIND, "")
	})
	if err != nil {
		return "", fmt.Errorf("pin namespace %s: %w", name, err)
	}
	return path, nil
}

// inMounts runs f in the mount namespace of a process. f must make its system
// calls on its own thread and start nothing.
func inMounts(pid int, f func() error) error {
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/mnt", pid))
	if err != nil {
		return err
	}
	defer ns.Close()
	return thread.Do(func() error {
		// A thread that shares its fs_struct with others cannot join a mount
		// namespace.
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return err
		}
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNS); err != nil {
			return err
		}
		return f()
	})
}
