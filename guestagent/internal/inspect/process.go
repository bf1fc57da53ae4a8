package inspect

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/procfs"
	"github.com/kata-checkpoint/kata-checkpoint/internal/thread"
)

// OwnPIDNamespace says whether a process is the first of its pid namespace. If
// not, the namespace is another container's, or was.
func OwnPIDNamespace(pid int) (bool, error) {
	pids, err := procfs.NSPIDs(pid)
	if err != nil {
		return false, err
	}
	return pids[len(pids)-1] == 1, nil
}

// Hostname is the one that a process sees.
func Hostname(pid int) (string, error) {
	var name unix.Utsname
	err := thread.Do(func() error {
		if err := thread.Enter(pid, "uts"); err != nil {
			return err
		}
		return unix.Uname(&name)
	})
	if err != nil {
		return "", fmt.Errorf("hostname of the container: %w", err)
	}
	return unix.ByteSliceToString(name.Nodename[:]), nil
}
