// SPDX-License-Identifier: Apache-2.0

// Package testproc starts processes for tests to inspect.
package testproc

import (
	"bufio"
	"os/exec"
	"testing"
)

// Start starts a command that exits at the end of its stdin, which is when the
// test ends. It returns the command's output.
func Start(t testing.TB, cmd *exec.Cmd) *bufio.Reader {
	t.Helper()
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		_ = cmd.Wait()
	})
	return bufio.NewReader(stdout)
}

// Ready starts a command like Start, and waits for its first line of output.
func Ready(t testing.TB, cmd *exec.Cmd) {
	t.Helper()
	if _, err := Start(t, cmd).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
}
