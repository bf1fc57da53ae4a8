// SPDX-License-Identifier: Apache-2.0

package exechelper

import (
	"io"
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/testhelper"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
)

const testToken = "THETOKENOFTHISTESTANDNOOTHER"

// pose starts a program with the helper's arguments.
func pose(t *testing.T, program string, args []string, attr *unix.SysProcAttr) int {
	t.Helper()
	cmd := exec.Command(program)
	cmd.Args, cmd.SysProcAttr = args, attr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = io.Discard, io.Discard
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return cmd.Process.Pid
}

// taken waits for the process to be taken for the helper.
func taken(p Placeholder, pid int, token string, limit time.Duration) bool {
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); <-time.After(time.Millisecond) {
		if h := p.take(pid, token); h != nil {
			_ = h.close()
			return true
		}
	}
	return false
}

// The helper is recognized by what no process of a container can have. The
// token, which none can know, is no more than one of these.
func TestOnlyTheHelperIsTaken(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root may take descriptors and make namespaces")
	}
	program := testhelper.Build(t)
	file, err := identify(program)
	if err != nil {
		t.Fatal(err)
	}
	p := Placeholder{PID: os.Getpid(), File: file}
	helper := []string{api.HelperPath, api.ExecMode, testToken}
	// A copy has the same content and is another file.
	copied := t.TempDir() + "/copy"
	data, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(copied, data, 0o755); err != nil {
		t.Fatal(err)
	}
	if !taken(p, pose(t, program, helper, nil), testToken, 20*time.Second) {
		t.Fatal("the helper is not taken")
	}
	for name, tc := range map[string]struct {
		program string
		args    []string
		attr    *unix.SysProcAttr
		token   string
	}{
		"another token":           {program, []string{helper[0], api.ExecMode, "ANOTHER"}, nil, testToken},
		"no token at all":         {program, []string{helper[0], api.ExecMode, ""}, nil, ""},
		"another program":         {copied, helper, nil, testToken},
		"another pid namespace":   {program, helper, &unix.SysProcAttr{Cloneflags: unix.CLONE_NEWPID}, testToken},
		"another mount namespace": {program, helper, &unix.SysProcAttr{Cloneflags: unix.CLONE_NEWNS}, testToken},
	} {
		t.Run(name, func(t *testing.T) {
			if taken(p, pose(t, tc.program, tc.args, tc.attr), tc.token, 200*time.Millisecond) {
				t.Error("taken for the helper")
			}
		})
	}
}
