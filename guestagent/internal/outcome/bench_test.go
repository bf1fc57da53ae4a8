// SPDX-License-Identifier: Apache-2.0

package outcome

import (
	"fmt"
	"os"
	"os/exec"
	"testing"

	"github.com/kata-checkpoint/kata-checkpoint/internal/procfs"
	"github.com/kata-checkpoint/kata-checkpoint/internal/testproc"
)

// started starts a shell with children in a mount namespace of its own, and returns
// the pids of all of them.
func started(b *testing.B, children int) []int {
	b.Helper()
	cmd := exec.Command("unshare", "--mount", "bash", "-c", fmt.Sprintf("for ((i = 0; i < %d; i++)); do read line <&0 & done; echo; read line", children))
	cmd.Dir = "/"
	testproc.Ready(b, cmd)
	pids, err := procfs.Children(cmd.Process.Pid)
	if err != nil {
		b.Fatal(err)
	}
	return append(pids, cmd.Process.Pid)
}

// BenchmarkCheck measures what a restore waits for, with so many processes. Read is
// done while CRIU restores.
func BenchmarkCheck(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("makes namespaces, which takes root")
	}
	placeholder := started(b, 0)[0]
	b.Run("Read", func(b *testing.B) {
		for b.Loop() {
			if _, err := Read(placeholder, rootRights(true)); err != nil {
				b.Fatal(err)
			}
		}
	})
	c, err := Read(placeholder, rootRights(true))
	if err != nil {
		b.Fatal(err)
	}
	for _, n := range []int{1, 100} {
		restored := started(b, n-1)
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			for b.Loop() {
				// What it finds, as that they are in the guest's PID namespace, does not
				// matter.
				_ = c.Check(restored)
			}
		})
	}
}
