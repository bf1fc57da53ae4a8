// SPDX-License-Identifier: Apache-2.0

package outcome

import (
	"os"
	"os/exec"
	"testing"

	"github.com/kata-checkpoint/kata-checkpoint/internal/testproc"
)

// started starts a shell in a mount namespace of its own.
func started(b *testing.B) int {
	b.Helper()
	cmd := exec.Command("unshare", "--mount", "sh", "-c", "echo; read line")
	cmd.Dir = "/"
	testproc.Ready(b, cmd)
	return cmd.Process.Pid
}

// BenchmarkCheck measures what a restore waits for: reading what a container may
// have, and checking one process.
func BenchmarkCheck(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("makes namespaces, which takes root")
	}
	placeholder, restored := started(b), started(b)
	for b.Loop() {
		c, err := Read(placeholder, rootRights(true))
		if err != nil {
			b.Fatal(err)
		}
		_ = c.Check([]int{restored})
	}
}
