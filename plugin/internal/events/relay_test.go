// SPDX-License-Identifier: Apache-2.0

package events

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	eventsapi "github.com/containerd/containerd/api/events"
	forward "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/fake"
)

// containerd takes events.
type containerd struct {
	mu     sync.Mutex
	got    []string
	refuse error
}

func (c *containerd) Forward(_ context.Context, r *forward.ForwardRequest) (*emptypb.Empty, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := r.GetEnvelope()
	id := ""
	if v, err := typeurl.UnmarshalAny(e.GetEvent()); err == nil {
		id = v.(interface{ GetContainerID() string }).GetContainerID()
	}
	c.got = append(c.got, e.GetTopic()+" "+id)
	if err := c.refuse; err != nil {
		c.refuse = nil
		return nil, err
	}
	return &emptypb.Empty{}, nil
}

func (c *containerd) events() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.got)
}

// start serves, and returns what ends it.
func (c *containerd) start(t *testing.T, path string) func() {
	t.Helper()
	server, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	forward.RegisterTTRPCEventsService(server, c)
	fake.Serve(t, server, path)
	return func() { server.Close() }
}

func newRelay(t *testing.T, address string) *Relay {
	t.Helper()
	r := NewRelay("ns", address)
	t.Cleanup(func() { r.Close() })
	return r
}

func flush(t *testing.T, r *Relay) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := r.Flush(ctx); err != nil {
		t.Fatal(err)
	}
}

// say is an event of Kata's.
func say(t *testing.T, r *Relay, topic string, event any) {
	t.Helper()
	a, err := typeurl.MarshalAnyToProto(event)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Forward(t.Context(), &forward.ForwardRequest{Envelope: &types.Envelope{Namespace: "ns", Topic: topic, Event: a}}); err != nil {
		t.Fatal(err)
	}
}

func want(t *testing.T, c *containerd, events ...string) {
	t.Helper()
	if got := c.events(); !slices.Equal(got, events) {
		t.Errorf("containerd got %q, want %q", got, events)
	}
}

func TestRelayKeepsTheOrder(t *testing.T) {
	c, path := &containerd{}, filepath.Join(t.TempDir(), "c.ttrpc")
	c.start(t, path)
	r := newRelay(t, "unix://"+path)
	var all []string
	for i := range 200 {
		id := fmt.Sprint("c", i)
		if i%2 == 0 {
			say(t, r, "/tasks/oom", &eventsapi.TaskOOM{ContainerID: id})
			all = append(all, "/tasks/oom "+id)
			continue
		}
		if err := r.Publish(t.Context(), "/tasks/paused", &eventsapi.TaskPaused{ContainerID: id}); err != nil {
			t.Fatal(err)
		}
		all = append(all, "/tasks/paused "+id)
	}
	flush(t, r)
	want(t, c, all...)
}

func TestOneExitForEachProcess(t *testing.T) {
	c, path := &containerd{}, filepath.Join(t.TempDir(), "c.ttrpc")
	c.start(t, path)
	r := newRelay(t, path)
	var told []string
	r.OnExit(func(container, exec string) { told = append(told, container+"/"+exec) })
	exit := func(id string) {
		say(t, r, "/tasks/exit", &eventsapi.TaskExit{ContainerID: "c1", ID: id, ExitStatus: 7})
	}

	exit("e1")
	exit("e1")
	exit("c1")
	exit("c1")
	r.Expect("c1", "e1") // the name is used again
	exit("e1")
	r.Forget("c1")
	exit("c1") // Kata's Rust shim may be late
	flush(t, r)
	want(t, c, "/tasks/exit c1", "/tasks/exit c1", "/tasks/exit c1")
	if !slices.Equal(told, []string{"c1/e1", "c1/", "c1/e1"}) {
		t.Errorf("the service was told %q", told)
	}
}

func TestHiddenContainersAreNotHeardOf(t *testing.T) {
	c, path := &containerd{}, filepath.Join(t.TempDir(), "c.ttrpc")
	c.start(t, path)
	r := newRelay(t, path)
	r.OnExit(func(container, _ string) { t.Errorf("told of %s", container) })
	r.Hide("throw-away")
	say(t, r, "/tasks/create", &eventsapi.TaskCreate{ContainerID: "throw-away"})
	say(t, r, "/tasks/exit", &eventsapi.TaskExit{ContainerID: "throw-away", ID: "throw-away"})
	say(t, r, "/tasks/delete", &eventsapi.TaskDelete{ContainerID: "throw-away"})
	say(t, r, "/tasks/delete", &eventsapi.TaskDelete{ID: "throw-away"}) // as Kata's Rust shim has it
	say(t, r, "/tasks/create", &eventsapi.TaskCreate{ContainerID: "c1"})
	flush(t, r)
	want(t, c, "/tasks/create c1")
}

// Whoever reports the exit of a container in place of Kata hides it first: then one
// of the two is heard.
func TestAContainerWhoseExitWasForwardedIsNotHidden(t *testing.T) {
	c, path := &containerd{}, filepath.Join(t.TempDir(), "c.ttrpc")
	c.start(t, path)
	r := newRelay(t, path)
	say(t, r, "/tasks/exit", &eventsapi.TaskExit{ContainerID: "c1", ID: "e1"})
	if !r.Hide("c1") {
		t.Error("c1 is not hidden, of which only an exec has exited")
	}
	say(t, r, "/tasks/exit", &eventsapi.TaskExit{ContainerID: "c1", ID: "c1"})
	say(t, r, "/tasks/exit", &eventsapi.TaskExit{ContainerID: "c2", ID: "c2"})
	if r.Hide("c2") {
		t.Error("c2 is hidden, whose exit was forwarded")
	}
	say(t, r, "/tasks/delete", &eventsapi.TaskDelete{ContainerID: "c2"})
	flush(t, r)
	want(t, c, "/tasks/exit c1", "/tasks/exit c2", "/tasks/delete c2")
}

func TestEventsOutliveARestartOfContainerd(t *testing.T) {
	c, dir := &containerd{}, t.TempDir()
	path := filepath.Join(dir, "c.ttrpc")
	stop := c.start(t, path)
	r := newRelay(t, path)
	say(t, r, "/tasks/create", &eventsapi.TaskCreate{ContainerID: "c1"})
	flush(t, r)
	stop()
	say(t, r, "/tasks/start", &eventsapi.TaskStart{ContainerID: "c1"})
	say(t, r, "/tasks/exit", &eventsapi.TaskExit{ContainerID: "c1", ID: "c1"})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := r.Flush(ctx); err == nil {
		t.Error("flushed to nobody")
	}
	c.start(t, path)
	flush(t, r)
	// A server that ends may still take an event whose answer is lost, and then it
	// is sent again.
	if got := slices.Compact(c.events()); !slices.Equal(got, []string{"/tasks/create c1", "/tasks/start c1", "/tasks/exit c1"}) {
		t.Errorf("containerd got %q", got)
	}
}

func TestWhatContainerdRefusesIsNotRepeated(t *testing.T) {
	c, path := &containerd{refuse: errgrpc.ToGRPCf(errdefs.ErrInvalidArgument, "no")}, filepath.Join(t.TempDir(), "c.ttrpc")
	c.start(t, path)
	r := newRelay(t, path)
	say(t, r, "/tasks/create", &eventsapi.TaskCreate{ContainerID: "c1"})
	say(t, r, "/tasks/start", &eventsapi.TaskStart{ContainerID: "c1"})
	flush(t, r)
	want(t, c, "/tasks/create c1", "/tasks/start c1")
}

func TestUnknownEventsGoThrough(t *testing.T) {
	c, path := &containerd{}, filepath.Join(t.TempDir(), "c.ttrpc")
	c.start(t, path)
	r := newRelay(t, path)
	for _, e := range []*types.Envelope{nil, {Topic: "/tasks/new", Event: &anypb.Any{TypeUrl: "nobody/knows", Value: []byte("x")}}} {
		if _, err := r.Forward(t.Context(), &forward.ForwardRequest{Envelope: e}); err != nil {
			t.Fatal(err)
		}
	}
	flush(t, r)
	want(t, c, "/tasks/new ")
}

// CRI-O gives no address: exits are noticed all the same.
func TestWithoutContainerd(t *testing.T) {
	r := newRelay(t, "")
	told := false
	r.OnExit(func(string, string) { told = true })
	say(t, r, "/tasks/exit", &eventsapi.TaskExit{ContainerID: "c1", ID: "c1"})
	flush(t, r)
	if !told {
		t.Error("the service was not told")
	}
}

func TestQueueIsBounded(t *testing.T) {
	r := newRelay(t, filepath.Join(t.TempDir(), "nobody"))
	for range queueLimit + 10 {
		if err := r.Publish(t.Context(), "/tasks/paused", &eventsapi.TaskPaused{ContainerID: "c1"}); err != nil {
			t.Fatal(err)
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.queue) != queueLimit {
		t.Errorf("%d events wait", len(r.queue))
	}
}

// Of processes that are gone the relay remembers enough to drop a second exit,
// and no more: a container may have an exec each second for a year.
func TestRelayForgetsExecs(t *testing.T) {
	c, path := &containerd{}, filepath.Join(t.TempDir(), "c.ttrpc")
	c.start(t, path)
	r := newRelay(t, "unix://"+path)
	exit := func(container, exec string) {
		say(t, r, "/tasks/exit", &eventsapi.TaskExit{ContainerID: container, ID: exec})
	}
	exit("init", "init")
	exit("c1", "first")
	for i := range 3 * recentLimit {
		r.Expect("c1", fmt.Sprint("exec", i))
		exit("c1", fmt.Sprint("exec", i))
		exit("c1", fmt.Sprint("exec", i))
	}
	exit("init", "init") // it is no exec
	flush(t, r)
	if got, all := len(c.events()), 2+3*recentLimit; got != all {
		t.Errorf("containerd got %d events, want %d", got, all)
	}
	if n := len(r.endedExecs.elements); n != recentLimit || r.endedExecs.order.Len() != n {
		t.Errorf("%d execs are remembered", n)
	}
	r.Forget("c1")
	if n := len(r.endedExecs.elements); n != 0 || r.endedExecs.order.Len() != 0 {
		t.Errorf("%d execs of a deleted container are remembered", n)
	}
	for i := range 3 * recentLimit {
		r.Hide(fmt.Sprint("hidden", i))
	}
	if n := len(r.hidden.elements); n != recentLimit {
		t.Errorf("%d containers are hidden", n)
	}
}
