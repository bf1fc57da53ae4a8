// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/procfs"
	"github.com/kata-checkpoint/kata-checkpoint/internal/testproc"
)

// A signal stops and continues the restored init or a process of an exec, and
// nothing else. Neither a later process of the same PID nor a process of no exec
// is reached.
func TestSignal(t *testing.T) {
	a := &Agent{dir: t.TempDir()}
	if err := os.Mkdir(a.dir+"/containers", 0o700); err != nil {
		t.Fatal(err)
	}
	var processes [2]process
	for i := range processes {
		cmd := exec.Command("sh", "-c", "echo ready; read line")
		testproc.Ready(t, cmd)
		var err error
		if processes[i], err = newProcess(cmd.Process.Pid); err != nil {
			t.Fatal(err)
		}
	}
	root, other := processes[0], processes[1]
	if err := a.save(&container{ID: "c1", Init: root, Restored: &root}); err != nil {
		t.Fatal(err)
	}
	if err := a.save(&container{ID: "c2", Init: root}); err != nil {
		t.Fatal(err)
	}
	forget, err := a.execs.add("token", other.PID)
	if err != nil {
		t.Fatal(err)
	}
	send := func(id, token string, sig unix.Signal) error {
		_, err := a.Signal(t.Context(), &api.SignalRequest{ContainerId: id, HelperToken: token, Signal: uint32(sig)})
		return errgrpc.ToNative(err)
	}
	for token, p := range map[string]process{"": root, "token": other} {
		for _, sig := range []unix.Signal{unix.SIGSTOP, unix.SIGCONT} { // its cleanup waits for one that is stopped
			stopped := sig == unix.SIGSTOP
			if err := send("c1", token, sig); err != nil {
				t.Fatal(err)
			}
			for deadline := time.Now().Add(20 * time.Second); ; {
				st, err := procfs.ReadStat(p.PID)
				if err != nil {
					t.Fatal(err)
				}
				if (st.State == 'T') == stopped {
					break
				}
				if time.Now().After(deadline) {
					t.Fatalf("%v for %q: its state is %c", sig, token, st.State)
				}
			}
		}
	}
	if err := send("c1", "", unix.SIGKILL); !errdefs.IsInvalidArgument(err) || !root.alive() {
		t.Errorf("SIGKILL: %v", err)
	}
	if err := send("c2", "", unix.SIGSTOP); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a container that was not restored: %v", err)
	}
	forget()
	if err := send("c1", "token", unix.SIGSTOP); !errdefs.IsNotFound(err) {
		t.Errorf("an exec that has ended: %v", err)
	}
	later := root
	later.Start--
	if err := later.signal(unix.SIGSTOP); !errdefs.IsNotFound(err) {
		t.Errorf("an earlier process with the same PID: %v", err)
	}
}
