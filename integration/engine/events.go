package engine

import (
	"context"
	"fmt"
	"sync"

	apievents "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/typeurl/v2"
)

// Events collects the ends of tasks that containerd reports, from the moment on at which it was made.
type Events struct {
	cancel context.CancelFunc
	done   chan struct{}

	mu    sync.Mutex
	exits []*apievents.TaskExit
	err   error
}

// Watch starts collecting. Close ends it.
func (e *Engine) Watch(ctx context.Context) *Events {
	ctx, cancel := context.WithCancel(ctx)
	w := &Events{cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(w.done)
		w.err = w.collect(ctx, e.Client)
	}()
	return w
}

func (w *Events) collect(ctx context.Context, c *client.Client) error {
	envelopes, errs := c.EventService().Subscribe(ctx, `topic=="/tasks/exit"`)
	for {
		select {
		case envelope := <-envelopes:
			event, err := typeurl.UnmarshalAny(envelope.Event)
			if err != nil {
				return fmt.Errorf("event %s: %w", envelope.Topic, err)
			}
			if exit, ok := event.(*apievents.TaskExit); ok {
				w.mu.Lock()
				w.exits = append(w.exits, exit)
				w.mu.Unlock()
			}
		case err := <-errs:
			if ctx.Err() != nil {
				return nil //nolint:nilerr // it was closed
			}
			return err
		}
	}
}

// Exits gives the statuses with which the first processes of a container have ended, one an event, in order.
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

// Close ends the collection, and says what ended it before.
func (w *Events) Close() error {
	w.cancel()
	<-w.done
	return w.err
}
