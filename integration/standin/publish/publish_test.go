package publish

import (
	"context"
	"net"
	"path/filepath"
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
		// An answer still under way goes out first: without it the event is sent again.
		if err := server.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
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
	expect(t, received, "/tasks/exit", "containerd.events.TaskExit")
	p.Close()
	p.Send(&events.TaskExit{}) // dropped, and no panic
}

func expect(t *testing.T, received receiver, topic, kind string) {
	t.Helper()
	select {
	case r := <-received:
		e := r.Envelope
		if e.Topic != topic || e.Namespace != "ns" || e.Event.TypeUrl != kind {
			t.Errorf("%s %s %s, want %s ns %s", e.Topic, e.Namespace, e.Event.TypeUrl, topic, kind)
		}
	case <-time.After(20 * time.Second):
		t.Fatalf("%s: not in time", topic)
	}
}
