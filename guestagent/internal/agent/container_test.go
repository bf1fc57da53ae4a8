// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
)

// A container whose process exits while it is looked at, or before, is refused
// with one sentence, whatever could not be read of it.
func TestExited(t *testing.T) {
	for name, exit := range map[string]func(*exec.Cmd) error{
		"a zombie": func(cmd *exec.Cmd) error {
			return unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		},
		"reaped": func(cmd *exec.Cmd) error { return cmd.Wait() },
	} {
		t.Run(name, func(t *testing.T) {
			a := &Agent{dir: t.TempDir()}
			if err := os.Mkdir(filepath.Join(a.dir, "containers"), 0o700); err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command("cat")
			stdin, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer func() { _ = cmd.Wait() }()
			defer stdin.Close()
			init, err := newProcess(cmd.Process.Pid)
			if err != nil {
				t.Fatal(err)
			}
			c := &container{ID: "c1", Init: init, Cgroup: t.TempDir(), Mounts: []inspect.Point{{Path: "/"}}}
			if err := a.save(c); err != nil {
				t.Fatal(err)
			}
			// The list of its processes is read after it was found to be running.
			list := filepath.Join(c.Cgroup, "cgroup.procs")
			if err := unix.Mkfifo(list, 0o600); err != nil {
				t.Fatal(err)
			}
			answer := make(chan error, 1)
			go func() {
				_, err := a.CheckCheckpoint(t.Context(), &api.CheckpointRequest{ContainerId: c.ID})
				answer <- err
			}()
			fifo, err := os.OpenFile(list, os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			stdin.Close()
			if err := exit(cmd); err != nil {
				t.Fatal(err)
			}
			if _, err := fifo.WriteString(strconv.Itoa(init.PID) + "\n"); err != nil {
				t.Fatal(err)
			}
			fifo.Close()
			checkExited(t, <-answer)

			_, err = a.CheckCheckpoint(t.Context(), &api.CheckpointRequest{ContainerId: c.ID})
			checkExited(t, err)
		})
	}
}

func checkExited(t *testing.T, err error) {
	t.Helper()
	if st := status.Convert(err); st.Code() != codes.FailedPrecondition || st.Message() != "the container's process has exited (KC-4011)" {
		t.Errorf("%s: %s", st.Code(), st.Message())
	}
}
