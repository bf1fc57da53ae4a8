package workload

import (
	"fmt"
	"strings"
)

// Ticks gives the numbers that counter has printed, in order. A line in which its places do not agree, one that is none of its lines, or a
// report of its own that something is wrong, is an error.
func Ticks(lines []string) ([]int, error) {
	var out []int
	for _, line := range lines {
		if strings.HasPrefix(line, "boot ") {
			continue
		}
		var n, file, shm int
		if _, err := fmt.Sscanf(line, "tick %d file %d shm %d", &n, &file, &shm); err != nil {
			return out, fmt.Errorf("after %d numbers the counter said %q", len(out), line)
		}
		if file != n || shm != n {
			return out, fmt.Errorf("the counter's places do not agree: %q", line)
		}
		out = append(out, n)
	}
	return out, nil
}

// Rounds gives the numbers of the rounds that files or memory have printed, in order.
func Rounds(lines []string) ([]int, error) {
	var out []int
	for _, line := range lines {
		if strings.HasPrefix(line, "boot ") || line == TerminatedLine || line == IgnoringLine {
			continue
		}
		var n int
		if _, err := fmt.Sscanf(line, "round %d", &n); err != nil {
			return out, fmt.Errorf("after %d rounds the workload said %q", len(out), line)
		}
		out = append(out, n)
	}
	return out, nil
}

// Boots gives the ids of the boots that a workload has been in, in order.
func Boots(lines []string) []string {
	var out []string
	for _, line := range lines {
		if id, ok := strings.CutPrefix(line, "boot "); ok {
			out = append(out, id)
		}
	}
	return out
}
