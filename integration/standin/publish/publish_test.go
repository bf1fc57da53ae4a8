// SPDX-License-Identifier: Apache-2.0

package publish

import (
	"context"
	"net"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/containerd/containerd/api/events"
	ttrpcevents "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/types/known/emptypb"
)

type receiver chan *ttrpcevents.ForwardRequest

func (r receiver) Forward(_ context.Context, request *ttrpcevents.ForwardRequest) (*emptypb.Empty, error) {
	r <- request
	return &emptypb.Empty{}, nil
}

func listen(t *testing.T, socket string, r receiver) (stop func()) {
	t.Helper()
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	ttrpcevents.RegisterTTRPCEventsService(server, r)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(context.Background(), l)
	}()
	return func() {
		server.Close()
		<-done
	}
}

func TestEventsOutliveTheEnginesRestart(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "ttrpc")
	received := make(receiver, 8)
	stop := listen(t, socket, received)
	p := New(socket, "ns")
	p.Send(&events.TaskStart{ContainerID: "c1", Pid: 7})
	expect(t, received, "/tasks/start", "containerd.events.TaskStart")
	stop()
	stop = listen(t, socket, received)
	defer stop()
	p.Send(&events.TaskExit{ContainerID: "c1", ID: "c1"})
	expect(t, received, "/tasks/exit", "containerd.events.TaskExit", "/tasks/start")
	p.Close()
	p.Send(&events.TaskExit{}) // dropped, and no panic
}

// expect takes the next event. One that came before is passed over: an engine
// that ends before its answer is out gets the event again.
func expect(t *testing.T, received receiver, topic, kind string, before ...string) {
	t.Helper()
	for {
		select {
		case r := <-received:
			e := r.Envelope
			if slices.Contains(before, e.Topic) {
				continue
			}
			if e.Topic != topic || e.Namespace != "ns" || e.Event.TypeUrl != kind {
				t.Errorf("%s %s %s, want %s ns %s", e.Topic, e.Namespace, e.Event.TypeUrl, topic, kind)
			}
			return
		case <-time.After(20 * time.Second):
			t.Fatalf("%s: not in time", topic)
		}
	}
}
