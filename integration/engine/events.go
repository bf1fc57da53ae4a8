// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"fmt"
	"sync"

	apievents "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/typeurl/v2"
)

// Events collects containerd's task events from its creation on.
type Events struct {
	cancel context.CancelFunc
	done   chan struct{}

	mu     sync.Mutex
	exits  []*apievents.TaskExit
	states map[string][]string // of containers
	err    error
}

// Watch starts collecting. Close ends it.
func (e *Engine) Watch(ctx context.Context) *Events {
	w := &Events{states: make(map[string][]string)}
	w.start(ctx, e.Client)
	return w
}

func (w *Events) start(ctx context.Context, c *client.Client) {
	ctx, w.cancel = context.WithCancel(ctx)
	w.done = make(chan struct{})
	go func() {
		defer close(w.done)
		w.err = w.collect(ctx, c)
	}()
}

// Rejoin continues collecting after a restart of containerd. Events in between
// are lost.
func (w *Events) Rejoin(ctx context.Context, e *Engine) {
	w.cancel()
	<-w.done
	w.start(ctx, e.Client)
}

func (w *Events) collect(ctx context.Context, c *client.Client) error {
	envelopes, errs := c.EventService().Subscribe(ctx, `topic~="^/tasks/(exit|paused|resumed|checkpointed)$"`)
	for {
		select {
		case envelope := <-envelopes:
			event, err := typeurl.UnmarshalAny(envelope.Event)
			if err != nil {
				return fmt.Errorf("event %s: %w", envelope.Topic, err)
			}
			w.add(event)
		case err := <-errs:
			if ctx.Err() != nil {
				return nil //nolint:nilerr // it was closed
			}
			return err
		}
	}
}

func (w *Events) add(event any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	state := func(container, what string) { w.states[container] = append(w.states[container], what) }
	switch event := event.(type) {
	case *apievents.TaskExit:
		w.exits = append(w.exits, event)
		if event.ContainerID == event.ID {
			state(event.ContainerID, fmt.Sprintf("exit %d", event.ExitStatus))
		}
	case *apievents.TaskPaused:
		state(event.ContainerID, "paused")
	case *apievents.TaskResumed:
		state(event.ContainerID, "resumed")
	case *apievents.TaskCheckpointed:
		state(event.ContainerID, "checkpointed "+event.Checkpoint)
	}
}

// States returns what happened to a container's init, in order: "paused",
// "resumed", "checkpointed PATH", "exit STATUS".
func (w *Events) States(container string) []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]string(nil), w.states[container]...)
}

// Exits returns the exit statuses of a container's inits, one for each event,
// in order.
func (w *Events) Exits(container string) []uint32 {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []uint32
	for _, exit := range w.exits {
		if exit.ContainerID == container && exit.ID == container {
			out = append(out, exit.ExitStatus)
		}
	}
	return out
}

// Close ends the collection and returns the error that ended it earlier, if
// any.
func (w *Events) Close() error {
	w.cancel()
	<-w.done
	return w.err
}
