// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"strings"
	"sync"
	"time"

	"github.com/containerd/ttrpc"

	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
	"github.com/kata-checkpoint/kata-checkpoint/internal/metrics"
)

// newReport begins what the node's metrics are told of an operation.
func (c *container) newReport(ctx context.Context) *metrics.Report {
	return &metrics.Report{Namespace: c.s.namespace, Container: c.id, Traceparent: traceparent(ctx)}
}

// traceparent is the trace that containerd hands on with a call, or empty: W3C's
// header as metadata of ttrpc (github.com/containerd/otelttrpc).
func traceparent(ctx context.Context) string {
	const longest = 64 // it has 55 characters
	value, ok := ttrpc.GetMetadataValue(ctx, "traceparent")
	if !ok || len(value) > longest {
		return ""
	}
	return value
}

// reported are the phases of a checkpoint, its pre-dumps as one.
func reported(list []imageset.Phase) (out []metrics.Phase) {
	for _, p := range list {
		if strings.HasPrefix(p.Name, preDumpPhase) {
			p.Name = metrics.PreDump
			if last := len(out) - 1; last >= 0 && out[last].Name == metrics.PreDump {
				out[last].Seconds += p.Duration.Seconds()
				continue
			}
		}
		out = append(out, metrics.Phase{Name: p.Name, Seconds: p.Duration.Seconds()})
	}
	return out
}

// freezes measures for how long a container is frozen around a checkpoint, which
// an engine may begin before it, by Pause, and end after it.
type freezes struct {
	mu     sync.Mutex
	since  time.Time
	wanted bool
}

// begin is called when the container is frozen.
func (f *freezes) begin() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.since = time.Now()
}

// checkpointed is called when a checkpoint begins: a container that is paused for
// another reason is nobody's figure.
func (f *freezes) checkpointed() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.wanted = true
}

// end is called when the container is thawed or has stopped.
func (f *freezes) end(c *container) {
	f.mu.Lock()
	since, wanted := f.since, f.wanted
	f.since, f.wanted = time.Time{}, false
	f.mu.Unlock()
	if wanted && !since.IsZero() {
		c.s.metrics.Report(metrics.Report{
			Operation: metrics.Frozen, Begin: since, Seconds: time.Since(since).Seconds(), Namespace: c.s.namespace, Container: c.id,
		})
	}
}
