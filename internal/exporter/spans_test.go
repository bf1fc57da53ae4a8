// SPDX-License-Identifier: Apache-2.0

package exporter

import (
	"encoding/hex"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	otlp "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/metrics"
)

const (
	traceID  = "0af7651916cd43dd8448eb211c80319c"
	parentID = "b7ad6b7169203331"
	sampled  = "00-" + traceID + "-" + parentID + "-01"
)

// inMemory is an exporter of figures whose spans stay in memory.
func inMemory(t *testing.T) (*Exporter, metrics.Spool, *tracetest.InMemoryExporter) {
	t.Helper()
	e, spool := newExporter(t)
	memory := tracetest.NewInMemoryExporter()
	var err error
	if e.spans, err = spansTo(t.Context(), trace.WithSyncer(memory)); err != nil {
		t.Fatal(err)
	}
	return e, spool, memory
}

// An operation is a span of its caller's trace, and its phases are spans below
// it, one after the other.
func TestSpans(t *testing.T) {
	e, spool, memory := inMemory(t)
	begin := time.Now().Add(-time.Minute).Truncate(time.Microsecond)
	spool.Report(metrics.Report{
		Operation: metrics.Checkpoint, Begin: begin, Seconds: 3, Bytes: 5, Namespace: "k8s.io", Container: "c1", Traceparent: sampled,
		Phases: []metrics.Phase{{Name: "freeze", Seconds: 0.5}, {Name: "made up by a guest", Seconds: 2}, {Name: "sync", Seconds: -1}, {Name: "commit", Seconds: 0.25}},
	})
	scrape(t, e.Handler())
	all := memory.GetSpans()
	got := map[string]tracetest.SpanStub{}
	for _, s := range all {
		got[s.Name] = s
		if s.SpanContext.TraceID().String() != traceID {
			t.Errorf("%s is in the trace %s", s.Name, s.SpanContext.TraceID())
		}
	}
	operation := got["kata-checkpoint.checkpoint"]
	if operation.Parent.SpanID().String() != parentID || !operation.StartTime.Equal(begin) || !operation.EndTime.Equal(begin.Add(3*time.Second)) || operation.Status.Code == codes.Error {
		t.Errorf("the operation is %+v", operation)
	}
	for _, want := range []string{"container.id=c1", "containerd.namespace=k8s.io", "kata_checkpoint.image_set.bytes=5"} {
		if !slices.ContainsFunc(operation.Attributes, func(a attribute.KeyValue) bool { return string(a.Key)+"="+a.Value.String() == want }) {
			t.Errorf("%s is missing: %v", want, operation.Attributes)
		}
	}
	at := begin
	for _, p := range []metrics.Phase{{Name: "freeze", Seconds: 0.5}, {Name: "other", Seconds: 2}, {Name: "commit", Seconds: 0.25}} {
		s := got[p.Name]
		if s.Parent.SpanID() != operation.SpanContext.SpanID() || !s.StartTime.Equal(at) || s.EndTime.Sub(s.StartTime) != seconds(p.Seconds) {
			t.Errorf("the phase %s is %+v", p.Name, s)
		}
		at = s.EndTime
	}
	if len(all) != 4 {
		t.Errorf("there are %d spans", len(all))
	}
	scrape(t, e.Handler())
	if again := memory.GetSpans(); len(again) != 4 {
		t.Errorf("there are %d spans after another scrape", len(again))
	}
}

// A failure is an error with the name of its code. What a restore has staged
// before its Start is no part of the span.
func TestSpanOfARestore(t *testing.T) {
	e, spool, memory := inMemory(t)
	begin := time.Now()
	spool.Report(metrics.Report{
		Operation: metrics.Restore, Reason: errcode.RestoreFailed.Name(), Begin: begin, Seconds: 5, Traceparent: sampled,
		Phases: []metrics.Phase{{Name: metrics.StageImages, Seconds: 2}, {Name: "guest: criu restore", Seconds: 3}},
	})
	scrape(t, e.Handler())
	all := memory.GetSpans()
	if len(all) != 2 || all[0].Name != "guest: criu restore" || all[1].Name != "kata-checkpoint.restore" || all[1].Status.Code != codes.Error ||
		all[1].Status.Description != "restore-failed" || all[1].EndTime.Sub(all[1].StartTime) != 3*time.Second {
		t.Errorf("the spans are %+v", all)
	}
}

// Without a trace that is sampled there are no spans.
func TestNoSpans(t *testing.T) {
	e, spool, memory := inMemory(t)
	for _, parent := range []string{"", "nonsense", "00-" + traceID + "-" + parentID + "-00", "00-" + strings.Repeat("0", 32) + "-" + parentID + "-01"} {
		spool.Report(metrics.Report{Operation: metrics.Checkpoint, Begin: time.Now(), Seconds: 1, Traceparent: parent})
	}
	spool.Report(metrics.Report{Operation: metrics.Frozen, Begin: time.Now(), Seconds: 1, Traceparent: sampled})
	spool.Report(metrics.Report{Operation: metrics.Checkpoint, Seconds: 1, Traceparent: sampled})
	scrape(t, e.Handler())
	if all := memory.GetSpans(); len(all) != 0 {
		t.Errorf("the spans are %+v", all)
	}
}

// A collector that is named in config.toml, or as OpenTelemetry names it, gets the
// spans, the last of them when the process ends.
func TestCollector(t *testing.T) {
	t.Run("config.toml", func(t *testing.T) { testCollector(t, func(url string) string { return url }) })
	t.Run("environment", func(t *testing.T) {
		testCollector(t, func(url string) string {
			t.Setenv(endpointEnv, url)
			return ""
		})
	})
}

func testCollector(t *testing.T, endpoint func(url string) string) {
	received := make(chan *otlp.ResourceSpans, 1)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		data, err := io.ReadAll(r.Body)
		request := &collector.ExportTraceServiceRequest{}
		if err = errors.Join(err, proto.Unmarshal(data, request)); err != nil || r.URL.Path != "/v1/traces" {
			t.Errorf("%s: %v", r.URL, err)
		}
		for _, s := range request.GetResourceSpans() {
			received <- s
		}
		w.Header().Set("Content-Type", "application/x-protobuf")
	}))
	defer server.Close()
	e, spool := newExporter(t)
	var err error
	if e.spans, err = newSpans(t.Context(), endpoint(server.URL)); err != nil {
		t.Fatal(err)
	}
	spool.Report(metrics.Report{Operation: metrics.Checkpoint, Begin: time.Now(), Seconds: 1, Traceparent: sampled})
	scrape(t, e.Handler())
	e.spans.close(t.Context())
	select {
	case got := <-received:
		if !strings.Contains(got.GetResource().String(), "kata-checkpoint") || len(got.GetScopeSpans()) != 1 || len(got.GetScopeSpans()[0].GetSpans()) != 1 {
			t.Fatalf("received %v", got)
		}
		span := got.GetScopeSpans()[0].GetSpans()[0]
		if hex.EncodeToString(span.GetParentSpanId()) != parentID || hex.EncodeToString(span.GetTraceId()) != traceID {
			t.Errorf("the span is %v", span)
		}
	default:
		t.Error("the collector has received nothing")
	}
}

func TestEnvironment(t *testing.T) {
	for name, tc := range map[string]struct {
		set   map[string]string
		wants bool
		err   string
	}{
		"nothing":             {nil, false, ""},
		"a collector":         {map[string]string{endpointEnv: "http://127.0.0.1:4318"}, true, ""},
		"one for traces":      {map[string]string{tracesEndpointEnv: "http://127.0.0.1:4318/v1/traces", tracesProtocolEnv: protocol, protocolEnv: "grpc"}, true, ""},
		"disabled":            {map[string]string{endpointEnv: "http://127.0.0.1:4318", disabledEnv: "true"}, false, ""},
		"by another protocol": {map[string]string{endpointEnv: "http://127.0.0.1:4317", protocolEnv: "grpc"}, false, "OTEL_EXPORTER_OTLP_PROTOCOL is grpc"},
	} {
		t.Run(name, func(t *testing.T) {
			for key, value := range tc.set {
				t.Setenv(key, value)
			}
			s, err := newSpans(t.Context(), "")
			defer s.close(t.Context())
			if (s != nil) != tc.wants || (err != nil) != (tc.err != "") || err != nil && !strings.Contains(err.Error(), tc.err) {
				t.Errorf("%v, %v", s, err)
			}
		})
	}
}
