// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"

	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	otlp "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// spanCollector takes spans over OTLP.
type spanCollector struct {
	mu    sync.Mutex
	spans []*otlp.Span
	err   error
}

func (c *spanCollector) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	data, err := io.ReadAll(r.Body)
	request := &collector.ExportTraceServiceRequest{}
	if err == nil {
		err = proto.Unmarshal(data, request)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil {
		c.err = err
	}
	for _, resource := range request.GetResourceSpans() {
		for _, scope := range resource.GetScopeSpans() {
			c.spans = append(c.spans, scope.GetSpans()...)
		}
	}
	w.Header().Set("Content-Type", "application/x-protobuf")
}

// named returns the spans with a name.
func (c *spanCollector) named(name string) (out []*otlp.Span) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.spans {
		if s.GetName() == name {
			out = append(out, s)
		}
	}
	return out
}

// byID returns the span with an ID, or nil.
func (c *spanCollector) byID(id []byte) *otlp.Span {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.spans {
		if string(s.GetSpanId()) == string(id) {
			return s
		}
	}
	return nil
}

// traced: where containerd traces, a checkpoint and a restore are spans below
// containerd's own span of the call to the shim, in the same trace, and have
// spans for their phases.
func traced(s *scenario) {
	c := &spanCollector{}
	server := httptest.NewServer(c)
	s.Cleanup(server.Close)
	s.configure("traces_endpoint", server.URL)
	s.check(s.testbed.KillNRI(s.ctx))
	s.check(s.testbed.StartNRI(s.ctx))
	s.check(s.testbed.KillContainerd(s.ctx))
	defer func() { // a cleanup's context has ended
		if err := s.testbed.KillContainerd(s.ctx); err != nil {
			s.Error(err)
		}
		s.startContainerd()
	}()
	s.startContainerdWith("OTEL_EXPORTER_OTLP_ENDPOINT="+server.URL, "OTEL_BSP_SCHEDULE_DELAY=500")

	container := s.create(counter("c"))
	first := s.run(container)
	s.waitNumbers(first.Output, workload.Ticks, 3)
	dir := s.checkpoint(first, true)
	s.waitExit(first, 137)
	restored := s.restore(container, dir)
	s.waitNumbers(restored.Output, workload.Ticks, 3)
	for name, call := range map[string]string{"kata-checkpoint.checkpoint": "Checkpoint", "kata-checkpoint.restore": "Start"} {
		var span, parent *otlp.Span
		if !s.eventually(settleTimeout, func() bool {
			s.scrape() // has the reports read at once
			if found := c.named(name); len(found) == 1 {
				span = found[0]
				parent = c.byID(span.GetParentSpanId())
			}
			return parent != nil
		}) {
			s.Errorf("%s: the span is %v, and its parent %v", name, span, parent)
			continue
		}
		if string(parent.GetTraceId()) != string(span.GetTraceId()) || !strings.HasSuffix(parent.GetName(), call) {
			s.Errorf("%s is below %v", name, parent)
		}
		if span.GetStartTimeUnixNano() < parent.GetStartTimeUnixNano() || span.GetEndTimeUnixNano() > parent.GetEndTimeUnixNano() {
			s.Errorf("%s lasts from %d to %d, and its parent from %d to %d", name, span.GetStartTimeUnixNano(), span.GetEndTimeUnixNano(),
				parent.GetStartTimeUnixNano(), parent.GetEndTimeUnixNano())
		}
		s.Logf("%s is below containerd's %s", name, parent.GetName())
	}
	for _, phase := range []string{"guest: criu dump", "guest: criu restore"} {
		if len(c.named(phase)) != 1 {
			s.Errorf("there are %d spans of %s", len(c.named(phase)), phase)
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	s.check(c.err)
}
