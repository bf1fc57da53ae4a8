// SPDX-License-Identifier: Apache-2.0

package inspect

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/procfs"
	"github.com/kata-checkpoint/kata-checkpoint/internal/thread"
)

// OwnPIDNamespace reports whether a process is the init of its PID namespace.
// If not, the namespace is, or was, another container's.
func OwnPIDNamespace(pid int) (bool, error) {
	pids, err := procfs.NSPIDs(pid)
	if err != nil {
		return false, err
	}
	return pids[len(pids)-1] == 1, nil
}

// Hostname returns the host name in a process's uts namespace.
func Hostname(pid int) (string, error) {
	var name unix.Utsname
	err := thread.Do(func() error {
		if err := thread.Enter(pid, "uts"); err != nil {
			return err
		}
		return unix.Uname(&name)
	})
	if err != nil {
		return "", fmt.Errorf("read the host name of the container: %w", err)
	}
	return unix.ByteSliceToString(name.Nodename[:]), nil
}
