// SPDX-License-Identifier: Apache-2.0

package task

import (
	"syscall"
	"testing"

	"github.com/containerd/containerd/api/runtime/task/v2"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
)

// What stops a placeholder or an exec helper stops nobody else: those signals
// are the agent's to deliver. All others are Kata's, and so are all of a
// container that was not restored.
func TestJobControlOfARestoredContainer(t *testing.T) {
	for _, restored := range []bool{false, true} {
		h := newHarness(t)
		h.create(nil, func(r *task.CreateTaskRequest) {
			if restored {
				r.Checkpoint = imageSet(t)
			}
		})
		for _, exec := range []string{"", "e"} {
			if exec != "" {
				r := &task.ExecProcessRequest{ID: "c1", ExecID: exec, Spec: &anypb.Any{Value: []byte("{}")}}
				if _, err := h.task.Exec(t.Context(), r); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := h.task.Start(t.Context(), &task.StartRequest{ID: "c1", ExecID: exec}); err != nil {
				t.Fatal(err)
			}
		}
		token := ""
		if restored {
			token = h.guest.Request("Exec").(*api.ExecRequest).GetHelperToken()
		}
		kata, agent := 0, 0
		for _, exec := range []string{"", "e"} {
			for _, signal := range []syscall.Signal{syscall.SIGSTOP, syscall.SIGCONT, syscall.SIGTSTP, syscall.SIGTERM} {
				if _, err := h.task.Kill(t.Context(), &task.KillRequest{ID: "c1", ExecID: exec, Signal: uint32(signal)}); err != nil {
					t.Fatal(err)
				}
				if !restored || signal == syscall.SIGTSTP || signal == syscall.SIGTERM {
					kata++
					continue
				}
				agent++
				want := &api.SignalRequest{ContainerId: "c1", Signal: uint32(signal)}
				if exec != "" {
					want.HelperToken = token
				}
				got := h.guest.Request("Signal").(*api.SignalRequest)
				if got.GetToken() == "" {
					t.Error("the agent got a request without the container's token")
				}
				got.Token = ""
				if got.String() != want.String() {
					t.Errorf("%v for %q: the agent got %v, want %v", signal, exec, got, want)
				}
			}
		}
		if n := count(h.kata.Calls(), "Kill c1", "Kill c1 e"); n != kata {
			t.Errorf("restored %t: Kata got %d signals, want %d", restored, n, kata)
		}
		if n := count(h.guest.Calls(), "Signal c1"); n != agent {
			t.Errorf("restored %t: the agent got %d signals, want %d", restored, n, agent)
		}
	}
}

func count(calls []string, names ...string) (n int) {
	for _, call := range calls {
		for _, name := range names {
			if call == name {
				n++
			}
		}
	}
	return n
}
