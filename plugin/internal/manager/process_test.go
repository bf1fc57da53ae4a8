// SPDX-License-Identifier: Apache-2.0

package manager

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/kata-checkpoint/kata-checkpoint/internal/pidfd"
	"github.com/kata-checkpoint/kata-checkpoint/internal/procfs"
	"github.com/kata-checkpoint/kata-checkpoint/internal/testproc"
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

// What serves the VM's files is the daemon's child with the sandbox in its
// arguments, and nothing else.
func TestVirtiofsd(t *testing.T) {
	const serve = "(exec -a %s sh -c 'read line' virtiofsd --shared-dir=/run/kata-containers/shared/sandboxes/%s/ro) <&0 &\n"
	for name, tc := range map[string]struct {
		program, sandbox string
		found            bool
	}{
		"its own":            {"/usr/libexec/virtiofsd", "sandbox1", true},
		"of the testbed":     {"/opt/testbed-virtiofsd", "sandbox1", true},
		"of another sandbox": {"/usr/libexec/virtiofsd", "sandbox2", false},
		"another program":    {"/usr/bin/qemu", "sandbox1", false},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			kata := exec.Command("bash", "-c", fmt.Sprintf(serve, tc.program, tc.sandbox)+"until [ \"$(cat /proc/$!/comm)\" = sh ]; do :; done; echo; wait")
			kata.Dir = dir
			testproc.Ready(t, kata)
			if err := os.WriteFile(filepath.Join(dir, "shim.pid"), fmt.Append(nil, kata.Process.Pid), 0o600); err != nil {
				t.Fatal(err)
			}
			children, err := procfs.Children(kata.Process.Pid)
			if err != nil || len(children) != 1 {
				t.Fatalf("children %v, %v", children, err)
			}
			f, err := Virtiofsd(dir, "sandbox1")
			if err != nil || (f != nil) != tc.found {
				t.Fatalf("found %v, %v", f, err)
			}
			if f == nil {
				return
			}
			defer f.Close()
			if err := syscall.Kill(children[0], syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			if err := pidfd.WaitExit(f); err != nil {
				t.Error(err)
			}
		})
	}
	if f, err := Virtiofsd(t.TempDir(), "sandbox1"); f != nil || err != nil {
		t.Errorf("without a daemon: %v, %v", f, err)
	}
}
