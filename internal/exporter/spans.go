// SPDX-License-Identifier: Apache-2.0

package exporter

import (
	"context"
	"net/url"
	"os"
	"time"

	"github.com/containerd/log"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	"go.opentelemetry.io/otel/sdk/trace"
	semconv "go.opentelemetry.io/otel/semconv/v1.40.0"
	api "go.opentelemetry.io/otel/trace"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/metrics"
	"github.com/kata-checkpoint/kata-checkpoint/internal/version"
)

// OpenTelemetry's own variables, as containerd reads them.
const (
	disabledEnv       = "OTEL_SDK_DISABLED"
	endpointEnv       = "OTEL_EXPORTER_OTLP_ENDPOINT"
	tracesEndpointEnv = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
	protocolEnv       = "OTEL_EXPORTER_OTLP_PROTOCOL"
	tracesProtocolEnv = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
	protocol          = "http/protobuf"
)

// flushTimeout bounds the last delivery of spans, whose collector may be gone.
const flushTimeout = 2 * time.Second

// spans turns reports into spans of the trace that containerd has handed on to
// the shim with its call. The shims leave that to this process: there is one of
// each for each sandbox.
type spans struct {
	provider *trace.TracerProvider
	tracer   api.Tracer
}

// newSpans returns what exports spans to the collector at a URL or, without one,
// to that of the environment, which containerd does not pass on to plugins that
// it starts. It is nil if there is none.
func newSpans(ctx context.Context, endpoint string) (*spans, error) {
	if os.Getenv(disabledEnv) == "true" || endpoint == "" && os.Getenv(endpointEnv) == "" && os.Getenv(tracesEndpointEnv) == "" {
		return nil, nil //nolint:nilnil // nil exports nothing
	}
	var options []otlptracehttp.Option
	if endpoint != "" {
		path, err := url.JoinPath(endpoint, "v1/traces")
		if err != nil {
			return nil, err
		}
		options = append(options, otlptracehttp.WithEndpointURL(path))
	}
	for _, name := range []string{tracesProtocolEnv, protocolEnv} {
		if p := os.Getenv(name); p != "" && endpoint == "" {
			if p != protocol {
				return nil, errcode.Usage.Errorf("%s is %s, and spans are exported with %s: leave it out, and name the collector's port for that (4318 as a rule)", name, p, protocol)
			}
			break
		}
	}
	exporter, err := otlptracehttp.New(ctx, options...)
	if err != nil {
		return nil, err
	}
	return spansTo(ctx, trace.WithBatcher(exporter))
}

func spansTo(ctx context.Context, option trace.TracerProviderOption) (*spans, error) {
	about, err := resource.New(ctx, resource.WithHost(),
		resource.WithAttributes(semconv.ServiceName("kata-checkpoint"), semconv.ServiceVersion(version.Version)), resource.WithFromEnv())
	if err != nil {
		return nil, err
	}
	// What the caller does not sample is not exported; there is no trace without a
	// caller's.
	provider := trace.NewTracerProvider(option, trace.WithResource(about), trace.WithSampler(trace.ParentBased(trace.NeverSample())))
	return &spans{provider, provider.Tracer("github.com/kata-checkpoint/kata-checkpoint")}, nil
}

// report exports an operation and its phases.
func (s *spans) report(ctx context.Context, r *metrics.Report) {
	if s == nil || r.Traceparent == "" || r.Begin.IsZero() || r.Seconds < 0 || r.Operation != metrics.Checkpoint && r.Operation != metrics.Restore {
		return
	}
	ctx = propagation.TraceContext{}.Extract(ctx, propagation.MapCarrier{"traceparent": r.Traceparent})
	if !api.SpanContextFromContext(ctx).IsValid() {
		return
	}
	attributes := []attribute.KeyValue{semconv.ContainerID(r.Container), attribute.String("containerd.namespace", r.Namespace)}
	if r.Bytes > 0 {
		attributes = append(attributes, attribute.Int64("kata_checkpoint.image_set.bytes", r.Bytes))
	}
	ctx, span := s.tracer.Start(ctx, "kata-checkpoint."+r.Operation, api.WithTimestamp(r.Begin), api.WithAttributes(attributes...), api.WithSpanKind(api.SpanKindServer))
	begin, end := r.Begin, r.Begin.Add(seconds(r.Seconds))
	for _, p := range r.Phases {
		if p.Seconds < 0 {
			continue
		}
		if p.Name == metrics.StageImages {
			span.SetAttributes(attribute.Float64("kata_checkpoint.stage_images.seconds", p.Seconds))
			end = end.Add(-seconds(p.Seconds))
			continue
		}
		_, phase := s.tracer.Start(ctx, metrics.PhaseName(p.Name), api.WithTimestamp(begin))
		begin = begin.Add(seconds(p.Seconds))
		phase.End(api.WithTimestamp(begin))
	}
	if r.Reason != metrics.Success {
		name := reason(r.Reason)
		span.SetStatus(codes.Error, name)
		span.SetAttributes(semconv.ErrorTypeKey.String(name))
	}
	span.End(api.WithTimestamp(end))
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

// close delivers what has not been delivered yet.
func (s *spans) close(ctx context.Context) {
	if s == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), flushTimeout)
	defer cancel()
	if err := s.provider.Shutdown(ctx); err != nil {
		log.G(ctx).WithError(err).Warn("failed to deliver the last spans")
	}
}
