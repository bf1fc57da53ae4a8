// SPDX-License-Identifier: Apache-2.0

// Package events forwards events to containerd: our own, and those of Kata's
// shim, which is given [Relay]'s socket in place of containerd's. All pass
// through one queue, in order, which outlives a restart of containerd. The
// relay drops events that containerd must not see, and tells the task service
// which processes have exited.
//
// Written against containerd 2.4 and Kata Containers 4.1.0.
package events

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"

	eventsapi "github.com/containerd/containerd/api/events"
	forward "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

const (
	// queueLimit bounds the queue while containerd cannot be reached.
	queueLimit = 8192
	// sendTimeout bounds one event, as in containerd's own shims.
	sendTimeout = 5 * time.Second
	// recentLimit bounds what is remembered of processes that have exited and of
	// containers that are hidden: an exec a second would fill the memory
	// otherwise. The second exit event of a process, for which it is remembered,
	// comes right after the first.
	recentLimit = 1024
	// retryPause is the maximum pause between two attempts to reach containerd.
	retryPause = time.Second
)

// process is a container's init, or an exec.
type process struct{ container, exec string }

// Relay forwards events to containerd. See [NewRelay].
type Relay struct {
	namespace string
	address   string
	onExit    func(container, exec string)

	mu     sync.Mutex
	queue  []*types.Envelope
	hidden *recent[string]
	// ended has the processes that have exited, execs apart: they are many.
	ended, endedExecs *recent[process]
	// change is closed, and replaced, when the queue changes.
	change chan struct{}

	cancel context.CancelFunc
	done   chan struct{}
}

// NewRelay starts a relay to containerd's ttrpc socket at address. Without an
// address, as under CRI-O, it drops all events. The caller closes it.
func NewRelay(namespace, address string) *Relay {
	ctx, cancel := context.WithCancel(context.Background())
	r := &Relay{
		namespace: namespace,
		address:   strings.TrimPrefix(address, "unix://"),
		onExit:    func(string, string) {},
		hidden:    newRecent[string](recentLimit),
		change:    make(chan struct{}),
		cancel:    cancel,
		done:      make(chan struct{}),

		ended: newRecent[process](recentLimit), endedExecs: newRecent[process](recentLimit),
	}
	go r.run(ctx)
	return r
}

// OnExit sets the function that is called when a process has exited, before the
// event is forwarded. It must be set before the first event.
func (r *Relay) OnExit(f func(container, exec string)) { r.onExit = f }

// Hide drops all events of a container from now on, unless the exit of its init was
// forwarded already. It reports whether it does.
func (r *Relay) Hide(container string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ended.has(process{container: container}) {
		return false
	}
	r.hidden.add(container)
	return true
}

// Expect is called before a process is created, so that its exit is not taken
// for the repeated exit of an earlier process of the same name.
func (r *Relay) Expect(container, exec string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	p := process{container, exec}
	r.exits(p).remove(p)
}

// Forget drops what is known of the execs of a container that was deleted.
func (r *Relay) Forget(container string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.endedExecs.removeFunc(func(p process) bool { return p.container == container })
}

// exits is called with the mutex held.
func (r *Relay) exits(p process) *recent[process] {
	if p.exec == "" {
		return r.ended
	}
	return r.endedExecs
}

// Forward implements containerd's event service for Kata's shim.
func (r *Relay) Forward(_ context.Context, req *forward.ForwardRequest) (*emptypb.Empty, error) {
	e := req.GetEnvelope()
	if e == nil {
		return &emptypb.Empty{}, nil
	}
	// Events of unknown types are forwarded.
	event, _ := typeurl.UnmarshalAny(e.GetEvent())
	if r.isHidden(containerOf(event)) {
		return &emptypb.Empty{}, nil
	}
	if exit, ok := event.(*eventsapi.TaskExit); ok {
		p := process{container: exit.GetContainerID()}
		if exit.GetID() != exit.GetContainerID() {
			p.exec = exit.GetID()
		}
		if !r.firstExit(p) {
			return &emptypb.Empty{}, nil
		}
		r.onExit(p.container, p.exec)
	}
	r.push(e)
	return &emptypb.Empty{}, nil
}

// containerOf returns the container that an event is about. In the TaskDelete
// of a container's init, Kata's Rust shim sets only the process's id.
func containerOf(event any) string {
	if c, ok := event.(interface{ GetContainerID() string }); ok && c.GetContainerID() != "" {
		return c.GetContainerID()
	}
	if c, ok := event.(interface{ GetID() string }); ok {
		return c.GetID()
	}
	return ""
}

func (r *Relay) isHidden(container string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.hidden.has(container)
}

// firstExit reports whether this is the first exit event of a process that is not
// hidden: Kata's Rust shim waits for a process both when it is created and when it is started
// (src/runtime-rs/crates/runtimes/src/manager.rs).
func (r *Relay) firstExit(p process) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	ended := r.exits(p)
	if ended.has(p) || r.hidden.has(p.container) {
		return false
	}
	ended.add(p)
	return true
}

// Publish implements containerd's Publisher for events of our own.
func (r *Relay) Publish(_ context.Context, topic string, event events.Event) error {
	a, err := typeurl.MarshalAnyToProto(event)
	if err != nil {
		return fmt.Errorf("publish %s: %w", topic, err)
	}
	r.push(&types.Envelope{Timestamp: timestamppb.Now(), Namespace: r.namespace, Topic: topic, Event: a})
	return nil
}

func (r *Relay) push(e *types.Envelope) {
	if r.address == "" {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.queue) >= queueLimit {
		log.L.WithField("topic", e.GetTopic()).Error("dropped an event: containerd accepts none, and the queue is full")
		return
	}
	r.queue = append(r.queue, e)
	r.changed()
}

// changed is called with the mutex held.
func (r *Relay) changed() {
	close(r.change)
	r.change = make(chan struct{})
}

// head waits for the oldest event.
func (r *Relay) head(ctx context.Context) *types.Envelope {
	for {
		r.mu.Lock()
		change := r.change
		if len(r.queue) > 0 {
			e := r.queue[0]
			r.mu.Unlock()
			return e
		}
		r.mu.Unlock()
		select {
		case <-change:
		case <-ctx.Done():
			return nil
		}
	}
}

// Flush waits until containerd has received all events, or ctx ends.
func (r *Relay) Flush(ctx context.Context) error {
	for {
		r.mu.Lock()
		change, waiting := r.change, len(r.queue)
		r.mu.Unlock()
		if waiting == 0 {
			return nil
		}
		select {
		case <-change:
		case <-ctx.Done():
			return fmt.Errorf("%d events did not reach containerd: %w", waiting, ctx.Err())
		}
	}
}

// Close stops the relay. Events that have not reached containerd are lost.
func (r *Relay) Close() error {
	r.cancel()
	<-r.done
	return nil
}

// run sends the queue's events, each until containerd has answered.
func (r *Relay) run(ctx context.Context) {
	defer close(r.done)
	var client *ttrpc.Client
	defer func() {
		if client != nil {
			client.Close()
		}
	}()
	pause := retryPause / 16
	for {
		e := r.head(ctx)
		if e == nil {
			return
		}
		err := r.send(ctx, &client, e)
		if ctx.Err() != nil {
			return
		}
		if err != nil && !isAnswer(err) {
			log.L.WithError(err).WithField("topic", e.GetTopic()).Debug("failed to forward an event to containerd, retrying")
			if client != nil {
				client.Close()
				client = nil
			}
			select {
			case <-time.After(pause):
			case <-ctx.Done():
				return
			}
			pause = min(2*pause, retryPause)
			continue
		}
		if err != nil {
			log.L.WithError(err).WithField("topic", e.GetTopic()).Error("containerd rejected an event")
		}
		pause = retryPause / 16
		r.mu.Lock()
		r.queue = r.queue[1:]
		r.changed()
		r.mu.Unlock()
	}
}

func (r *Relay) send(ctx context.Context, client **ttrpc.Client, e *types.Envelope) error {
	ctx, cancel := context.WithTimeout(ctx, sendTimeout)
	defer cancel()
	if *client == nil {
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", r.address)
		if err != nil {
			return err
		}
		*client = ttrpc.NewClient(conn)
	}
	_, err := forward.NewTTRPCEventsClient(*client).Forward(ctx, &forward.ForwardRequest{Envelope: e})
	return err
}

// isAnswer reports whether an error is containerd's own answer, which a retry
// would not change.
func isAnswer(err error) bool {
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, ttrpc.ErrClosed) {
		return false
	}
	_, ok := status.FromError(err)
	return ok
}
