// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"bytes"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

func TestObedientObeys(t *testing.T) {
	status := -1
	var out, errout bytes.Buffer
	o := &obedient{command: filepath.Join(t.TempDir(), "command"), stderr: &errout, exit: func(n int) { status = n }}
	o.listen()
	step := func() {
		if err := o.round(&out); err != nil {
			t.Fatal(err)
		}
	}
	step()
	if out.String() != "round 1\n" || errout.String() != "round 1\n" || status != -1 {
		t.Errorf("printed %q and %q, status %d", out.String(), errout.String(), status)
	}
	o.signals <- syscall.SIGTERM
	if step(); status != TerminatedStatus {
		t.Errorf("status %d after SIGTERM", status)
	}
	if err := os.WriteFile(o.command, []byte("exit 44\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if step(); status != 44 {
		t.Errorf("status %d on command", status)
	}
	if err := os.WriteFile(o.command, []byte("sing\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := o.round(&out); err == nil {
		t.Error("obeyed a command that there is not")
	}
}
