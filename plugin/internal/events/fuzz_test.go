// SPDX-License-Identifier: Apache-2.0

package events

import (
	"testing"

	eventsapi "github.com/containerd/containerd/api/events"
	forward "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/types/known/anypb"
)

// Whatever Kata sends is one event at most, and an exit is reported once.
func FuzzForward(f *testing.F) {
	for _, e := range []any{
		&eventsapi.TaskExit{ContainerID: "c1", ID: "c1"}, &eventsapi.TaskExit{ContainerID: "c1", ID: "exec"}, &eventsapi.TaskDelete{ID: "hidden"}, &eventsapi.TaskOOM{ContainerID: "c1"},
	} {
		a, err := typeurl.MarshalAnyToProto(e)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(a.GetTypeUrl(), a.GetValue())
	}
	f.Add("containerd.events.TaskExit", []byte{0xff})
	f.Add("", []byte(nil))
	f.Fuzz(func(t *testing.T, url string, value []byte) {
		r := NewRelay("ns", "")
		defer r.Close()
		r.address = "unix:///nowhere" // so that the queue keeps what it gets
		r.Hide("hidden")
		exits := map[process]int{}
		r.OnExit(func(container, exec string) { exits[process{container, exec}]++ })
		for range 2 {
			if _, err := r.Forward(t.Context(), &forward.ForwardRequest{Envelope: &types.Envelope{Event: &anypb.Any{TypeUrl: url, Value: value}}}); err != nil {
				t.Fatal(err)
			}
		}
		for p, n := range exits {
			if n != 1 || p.container == "hidden" {
				t.Errorf("%v has exited %d times", p, n)
			}
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		if len(r.queue) > 2 || len(exits) > 1 || len(exits) == 1 && len(r.queue) > 1 {
			t.Errorf("%d events, %d exits", len(r.queue), len(exits))
		}
	})
}
