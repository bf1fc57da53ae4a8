// SPDX-License-Identifier: Apache-2.0

// Package publish sends a shim's events to containerd, at the address in the
// environment. Without one (CRI-O), events are only logged.
package publish

import (
	"context"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/api/events"
	ttrpcevents "github.com/containerd/containerd/api/services/ttrpc/events/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// limit is the timeout of one event, as in Kata.
const limit = 5 * time.Second

// Publisher sends events one at a time, in the order of Send.
type Publisher struct {
	address   string
	namespace string
	queue     chan *types.Envelope
	done      sync.WaitGroup

	mu     sync.Mutex
	closed bool
}

// New starts a publisher. It connects with the first event.
func New(address, namespace string) *Publisher {
	p := &Publisher{address: strings.TrimPrefix(address, "unix://"), namespace: namespace, queue: make(chan *types.Envelope, 128)}
	p.done.Go(p.run)
	return p
}

// Send queues an event.
func (p *Publisher) Send(event proto.Message) {
	// containerd looks types up by the bare message name.
	raw, err := proto.Marshal(event)
	if err != nil {
		log.L.WithError(err).Error("failed to send event")
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return
	}
	p.queue <- &types.Envelope{
		Timestamp: timestamppb.Now(),
		Namespace: p.namespace,
		Topic:     topic(event),
		Event:     &anypb.Any{TypeUrl: string(event.ProtoReflect().Descriptor().FullName()), Value: raw},
	}
}

// Close sends the queued events and stops. Later events are dropped.
func (p *Publisher) Close() {
	p.mu.Lock()
	if !p.closed {
		p.closed = true
		close(p.queue)
	}
	p.mu.Unlock()
	p.done.Wait()
}

func (p *Publisher) run() {
	var client *ttrpc.Client
	defer func() {
		if client != nil {
			client.Close()
		}
	}()
	for e := range p.queue {
		if p.address == "" {
			log.L.WithField("topic", e.Topic).Info("event")
			continue
		}
		var err error
		// A restarted containerd has closed the old connection.
		for range 2 {
			if client == nil {
				if client, err = p.connect(); err != nil {
					continue
				}
			}
			ctx, cancel := context.WithTimeout(context.Background(), limit)
			_, err = ttrpcevents.NewTTRPCEventsClient(client).Forward(ctx, &ttrpcevents.ForwardRequest{Envelope: e})
			cancel()
			if err == nil {
				break
			}
			client.Close()
			client = nil
		}
		if err != nil {
			log.L.WithError(err).WithField("topic", e.Topic).Error("failed to send event")
		}
	}
}

func (p *Publisher) connect() (*ttrpc.Client, error) {
	c, err := net.DialTimeout("unix", p.address, limit)
	if err != nil {
		return nil, fmt.Errorf("connect to containerd's events: %w", err)
	}
	return ttrpc.NewClient(c), nil
}

func topic(event proto.Message) string {
	switch event.(type) {
	case *events.TaskCreate:
		return "/tasks/create"
	case *events.TaskStart:
		return "/tasks/start"
	case *events.TaskExit:
		return "/tasks/exit"
	case *events.TaskDelete:
		return "/tasks/delete"
	case *events.TaskExecAdded:
		return "/tasks/exec-added"
	case *events.TaskExecStarted:
		return "/tasks/exec-started"
	}
	return "/tasks/?"
}
