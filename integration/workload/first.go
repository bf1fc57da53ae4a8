// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strings"
)

// First words of the lines that first-instruction prints.
const (
	MountLine = "mount" // followed by a line of /proc/self/mountinfo
	EntryLine = "entry" // followed by the name of a file in /
	EndLine   = "end"
)

// firstInstruction prints, before anything else, the mounts and the root
// directory that the container sees. What is hidden too late would still be
// there.
func firstInstruction(w io.Writer) error {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	root, err := os.ReadDir("/")
	if err != nil {
		return err
	}
	out := bufio.NewWriter(w)
	for line := range strings.Lines(string(mounts)) {
		fmt.Fprint(out, MountLine, " ", line)
	}
	for _, entry := range root {
		fmt.Fprintln(out, EntryLine, entry.Name())
	}
	fmt.Fprintln(out, EndLine)
	return out.Flush()
}
