// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// BytesWritten returns how many bytes the testbed's running processes of a
// program have passed to write calls, on files, sockets and pipes alike.
// Reflinked blocks do not count.
func (t *Testbed) BytesWritten(program string) (int64, error) {
	processes, err := t.owned()
	if err != nil {
		return 0, err
	}
	var sum int64
	for _, p := range processes {
		cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p.PID))
		if err != nil {
			continue // it has exited
		}
		if name, _, _ := strings.Cut(string(cmdline), "\x00"); filepath.Base(name) != program {
			continue
		}
		io, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", p.PID))
		if err != nil {
			return 0, fmt.Errorf("bytes written by %s: %w", program, err)
		}
		for line := range strings.Lines(string(io)) {
			var n int64
			if _, err := fmt.Sscanf(line, "wchar: %d", &n); err == nil {
				sum += n
			}
		}
	}
	return sum, nil
}
