// SPDX-License-Identifier: Apache-2.0

package bundle

import (
	"os/exec"
	"testing"
)

func TestVMEnded(t *testing.T) {
	dir := t.TempDir()
	if VMEnded(dir) {
		t.Error("a VM that was never noted has ended")
	}
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if err := SetVM(dir, cmd.Process.Pid); err != nil {
		t.Fatal(err)
	}
	if VMEnded(dir) {
		t.Error("a VM that runs has ended")
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if !VMEnded(dir) {
		t.Error("a VM that was killed has not ended")
	}
}
