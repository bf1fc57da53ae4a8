// SPDX-License-Identifier: Apache-2.0

package manager

import (
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/kata-checkpoint/kata-checkpoint/internal/procfs"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/bundle"
)

func TestTheVMOfASandboxIsEndedAndNoOtherProcess(t *testing.T) {
	for name, args := range map[string][]string{
		"its VM": {"--api-socket", "/run/vc/vm/sandbox1/clh-api.sock"},
		"other":  {"--api-socket", "/run/vc/vm/sandbox2/clh-api.sock"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			cmd := exec.Command("sh", append([]string{"-c", "while :; do sleep 60; done"}, args...)...)
			cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan struct{})
			go func() { _ = cmd.Wait(); close(ended) }()
			t.Cleanup(func() {
				_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
				<-ended
			})
			if err := bundle.SetVM(dir, cmd.Process.Pid); err != nil {
				t.Fatal(err)
			}
			if err := endVM(dir, "sandbox1", time.Now().Add(10*time.Second)); err != nil {
				t.Fatal(err)
			}
			_, err := procfs.StartTime(cmd.Process.Pid)
			if alive := err == nil; alive != (name == "other") {
				t.Errorf("alive: %v", alive)
			}
		})
	}
}

func TestAnotherProcessWithTheVMsPidIsLeftAlone(t *testing.T) {
	dir := t.TempDir()
	if err := endVM(dir, "sandbox1", time.Now()); err != nil {
		t.Errorf("without a note: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "kata-checkpoint.vm"), []byte("1 999999999\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := endVM(dir, "", time.Now()); err != nil {
		t.Errorf("of another time: %v", err)
	}
}
