// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
	"github.com/kata-checkpoint/kata-checkpoint/internal/testproc"
)

// A process in a cgroup that the container has made is refused, and an empty
// cgroup is not.
func TestOwnCgroups(t *testing.T) {
	cmd := exec.Command("sh", "-c", "echo ready; read line")
	testproc.Ready(t, cmd)
	pid := cmd.Process.Pid
	_, c := adopted(t, pid)
	own := filepath.Join(c.tree(), "own", "below")
	if err := os.MkdirAll(own, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{c.tree(), own} {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0o600); err != nil {
			t.Fatal(err)
		}
		look, err := inspect.LookAtFiles(t.Context(), pid, []int{pid}, c.Mounts)
		if err != nil {
			t.Fatal(err)
		}
		findings, err := ownCgroups(c, look)
		if err != nil {
			t.Fatal(err)
		}
		err = inspect.Refusal(findings)
		if found := err != nil && strings.Contains(err.Error(), "in a cgroup of its own, /own/below, "); found != (dir == own) {
			t.Errorf("in %s: %v", dir, err)
		}
	}
	if err := os.WriteFile(filepath.Join(c.tree(), "cgroup.procs"), []byte(strconv.Itoa(pid)), 0o600); err != nil {
		t.Fatal(err)
	}
}
