package workload

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strings"
)

// Words that begin the lines of first-instruction.
const (
	MountLine = "mount" // followed by a line of /proc/self/mountinfo
	EntryLine = "entry" // followed by the name of a file in /
	EndLine   = "end"
)

// firstInstruction prints, before it does anything else, what a container can see of its mounts and of its root directory. What was taken
// away only just in time would still be there.
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
