// SPDX-License-Identifier: Apache-2.0

package bundle

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/kata-checkpoint/kata-checkpoint/internal/procfs"
)

// vmName is our file in the bundle of a sandbox that names its VM's process.
const vmName = "kata-checkpoint.vm"

// SetVM records the process that Kata reports for a sandbox, its VMM.
func SetVM(dir string, pid int) error {
	start, err := procfs.StartTime(pid)
	if err != nil {
		return err
	}
	return replaceFile(filepath.Join(dir, vmName), fmt.Appendf(nil, "%d %d\n", pid, start))
}

// VM returns what SetVM has recorded, the pid and the start time (see
// [procfs.StartTime]) of the VMM, or a pid of 0 where it has recorded nothing.
func VM(dir string) (pid int, start uint64, err error) {
	data, err := os.ReadFile(filepath.Join(dir, vmName))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, 0, nil
	}
	if err != nil {
		return 0, 0, err
	}
	if _, err := fmt.Sscanf(string(data), "%d %d\n", &pid, &start); err != nil {
		return 0, 0, fmt.Errorf("%s: %w", vmName, err)
	}
	return pid, start, nil
}

// VMEnded reports whether the VM that SetVM has recorded is known to have
// ended.
func VMEnded(dir string) bool {
	pid, start, err := VM(dir)
	if err != nil || pid == 0 {
		return false
	}
	st, err := procfs.ReadStat(pid)
	return errors.Is(err, fs.ErrNotExist) || err == nil && (st.StartTime != start || st.Exited())
}
