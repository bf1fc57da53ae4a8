// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"fmt"
	"strings"
)

// Ticks returns the numbers that counter printed, in order. A line in which its
// places differ, an unknown line, and an error that the counter reported are
// errors.
func Ticks(lines []string) ([]int, error) {
	var out []int
	for _, line := range lines {
		if strings.HasPrefix(line, "boot ") {
			continue
		}
		var n, file, shm int
		if _, err := fmt.Sscanf(line, "tick %d file %d shm %d", &n, &file, &shm); err != nil {
			return out, fmt.Errorf("after %d numbers the counter printed %q", len(out), line)
		}
		if file != n || shm != n {
			return out, fmt.Errorf("the counter's places differ: %q", line)
		}
		out = append(out, n)
	}
	return out, nil
}

// Rounds returns the numbers of the rounds that a workload printed, in order.
func Rounds(lines []string) ([]int, error) {
	var out []int
	for _, line := range lines {
		if strings.HasPrefix(line, "boot ") || strings.HasPrefix(line, Bound) || line == TerminatedLine || line == IgnoringLine {
			continue
		}
		var n int
		if _, err := fmt.Sscanf(line, "round %d", &n); err != nil {
			return out, fmt.Errorf("after %d rounds the workload printed %q", len(out), line)
		}
		out = append(out, n)
	}
	return out, nil
}

// Boots returns the boot ids of the kernels that a workload ran on, in order.
func Boots(lines []string) []string {
	var out []string
	for _, line := range lines {
		if id, ok := strings.CutPrefix(line, "boot "); ok {
			out = append(out, id)
		}
	}
	return out
}
