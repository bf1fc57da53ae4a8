// SPDX-License-Identifier: Apache-2.0

package criu

import (
	"bufio"
	"fmt"
	"os"
	"strings"
)

// Error is the failure of a dump or restore.
type Error struct {
	What string
	Err  error
	// Log has the relevant lines of CRIU's log.
	Log []string
}

func (e *Error) Error() string {
	if len(e.Log) == 0 {
		return fmt.Sprintf("criu %s: %v (without a log)", e.What, e.Err)
	}
	text := strings.Join(e.Log, "\n")
	for sign, advice := range advices {
		if strings.Contains(text, sign) {
			return fmt.Sprintf("%s (criu %s: %v); its log says:\n%s", advice, e.What, e.Err, text)
		}
	}
	return fmt.Sprintf("criu %s: %v; its log says:\n%s", e.What, e.Err, strings.Join(e.Log, "\n"))
}

// advices say what to do about a failure, by a message in CRIU's log.
var advices = map[string]string{
	"External socket is used": "a process has a unix socket that is connected to outside of the container: close the connection before the checkpoint",
	"No space left on device": "no space left for the images in the shim's state_dir on the host: free some, or set state_dir to a directory on another file system",
}

func (e *Error) Unwrap() error { return e.Err }

// Bounds of what is quoted from a log.
const (
	contextLines = 3
	maxQuoted    = 40
)

// Tail returns the lines of CRIU's log that explain a failure: each error with
// a few lines before it, or the last lines if there is no error.
func Tail(path string) []string {
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer f.Close()
	var out, before []string
	s := bufio.NewScanner(f)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		line := s.Text()
		if strings.Contains(line, "Error (") {
			out = append(append(out, before...), line)
			before = nil
			continue
		}
		if before = append(before, line); len(before) > contextLines {
			before = before[1:]
		}
	}
	if len(out) == 0 {
		out = before
	}
	if len(out) > maxQuoted {
		// The first error is the cause; the others are its consequences.
		out = append(out[:maxQuoted], fmt.Sprintf("(%d more lines)", len(out)-maxQuoted))
	}
	return out
}

// runIDSign stands before the id that a CRIU has chosen for its run (util_init in
// criu/util.c).
const runIDSign = "CRIU run id = "

// RunID finds the id of the run in a log of CRIU's, after which its network lock is
// named; empty if the log lacks it.
func RunID(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		if _, id, ok := strings.Cut(s.Text(), runIDSign); ok {
			return strings.TrimPrefix(strings.TrimSpace(id), "0x")
		}
	}
	return ""
}
