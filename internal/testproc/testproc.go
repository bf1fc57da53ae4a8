// Package testproc starts processes for tests to look at.
package testproc

import (
	"bufio"
	"os/exec"
	"testing"
)

// Start starts a command that prints lines and ends at the end of its stdin,
// which is the test's. It returns what the command prints.
func Start(t *testing.T, cmd *exec.Cmd) *bufio.Reader {
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

// Ready starts a command as Start does, and waits until it has printed a line.
func Ready(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	if _, err := Start(t, cmd).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
}
