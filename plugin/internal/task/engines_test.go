// SPDX-License-Identifier: Apache-2.0

package task

import (
	"slices"
	"testing"

	"github.com/containerd/containerd/api/runtime/task/v2"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
)

// What reaches a shim when somebody asks an engine for a checkpoint, call by
// call, and what comes of it.
func TestEngines(t *testing.T) {
	const (
		state, pause, checkpoint, resume = "State", "Pause", "Checkpoint", "Resume"
		paused, made, resumed            = "/tasks/paused", "/tasks/checkpointed", "/tasks/resumed"
	)
	cri := func(s *specs.Spec) {
		s.Annotations["io.kubernetes.cri.container-type"], s.Annotations["io.kubernetes.cri.sandbox-id"] = "container", "c0"
	}
	locks := &api.CheckpointOptions{FileLocks: true}
	work := t.TempDir()
	for name, tc := range map[string]struct {
		spec    func(*specs.Spec)
		paused  bool // by the user, before
		calls   []string
		options *runcoptions.CheckpointOptions

		status string
		events []string
		guest  *api.CheckpointOptions
	}{
		"nerdctl checkpoint create, docker checkpoint create": {
			calls:  []string{state, state, pause, checkpoint, resume},
			status: "STOPPED", events: []string{paused, made}, guest: locks,
		},
		"nerdctl checkpoint create --leave-running, with the annotation": {
			spec: leaveRunning, calls: []string{state, state, pause, checkpoint, resume},
			status: "RUNNING", events: []string{paused, made, resumed}, guest: locks,
		},
		"nerdctl checkpoint create of a paused container": {
			paused: true, calls: []string{state, checkpoint},
			status: "STOPPED", events: []string{paused, made}, guest: locks,
		},
		"nerdctl checkpoint create of a paused container, with the annotation": {
			spec: leaveRunning, paused: true, calls: []string{state, checkpoint},
			status: "PAUSED", events: []string{paused, made}, guest: locks,
		},
		"ctr task checkpoint": {
			calls: []string{state, pause, checkpoint, resume}, options: &runcoptions.CheckpointOptions{WorkPath: work},
			status: "RUNNING", events: []string{paused, made, resumed}, guest: locks,
		},
		"ctr task checkpoint --exit": {
			calls: []string{state, pause, checkpoint, resume}, options: &runcoptions.CheckpointOptions{WorkPath: work, Exit: true},
			status: "STOPPED", events: []string{paused, made}, guest: locks,
		},
		"ctr containers checkpoint --task": {
			calls: []string{pause, checkpoint, resume}, options: &runcoptions.CheckpointOptions{FileLocks: true},
			status: "RUNNING", events: []string{paused, made, resumed}, guest: locks,
		},
		"crictl checkpoint, kubelet": {
			spec: cri, calls: []string{state, pause, checkpoint, resume},
			status: "RUNNING", events: []string{paused, made, resumed}, guest: locks,
		},
		"a client that does not pause": {
			calls: []string{checkpoint}, options: &runcoptions.CheckpointOptions{OpenTcp: true},
			status: "RUNNING", events: []string{made}, guest: &api.CheckpointOptions{TcpEstablished: true, FileLocks: true},
		},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHarness(t)
			h.run(tc.spec)
			if tc.paused {
				h.pause()
			}
			request := &task.CheckpointTaskRequest{ID: "c1", Path: t.TempDir()}
			if tc.options != nil {
				request.Options = pack(t, tc.options)
			}
			for _, call := range tc.calls {
				var err error
				switch call {
				case state:
					h.status()
				case pause:
					h.pause()
				case checkpoint:
					_, err = h.task.Checkpoint(t.Context(), request)
				case resume:
					h.resume()
				}
				if err != nil {
					t.Fatalf("%s: %v", call, err)
				}
			}
			if got := h.status(); got != tc.status {
				t.Errorf("State reports %s, want %s", got, tc.status)
			}
			if got := h.events.published(); !slices.Equal(got, tc.events) {
				t.Errorf("events %q, want %q", got, tc.events)
			}
			asked := h.guest.Request("Checkpoint").(*api.CheckpointRequest)
			if !proto.Equal(asked.GetOptions(), tc.guest) || asked.GetStop() != (tc.status == "STOPPED") {
				t.Errorf("the guest is asked for %v", asked)
			}
			for _, call := range []string{"Pause c1", "Resume c1", "Checkpoint c1"} {
				if h.kata.Called(call) {
					t.Errorf("Kata got %s", call)
				}
			}
		})
	}
}
