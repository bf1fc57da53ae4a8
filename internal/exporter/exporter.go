// SPDX-License-Identifier: Apache-2.0

// Package exporter serves the figures of a node's shims to Prometheus. It reads
// what they report in the spool (package internal/metrics), and is served by
// kata-checkpoint-nri, the process of which a node has one.
package exporter

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"

	"github.com/containerd/log"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/kata-checkpoint/kata-checkpoint/internal/config"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/metrics"
	"github.com/kata-checkpoint/kata-checkpoint/internal/version"
)

// Labels.
const (
	byResult    = "result"
	byReason    = "reason"
	byOperation = "operation"
	byPhase     = "phase"
	byDirectory = "directory"
)

// Values of the label result. Of a success the reason is empty.
const (
	success = "success"
	failure = "failure"
)

// interval is how often the spool is emptied if nobody scrapes.
const interval = 15 * time.Second

// Exporter counts what is reported, from its start on.
type Exporter struct {
	spool metrics.Spool
	// stored are the directories whose sizes are figures, by their names.
	stored   map[string]string
	registry *prometheus.Registry
	// spans exports what has been reported with a trace; nil: nothing is.
	spans    *spans
	endpoint string
	now      func() time.Time

	// mu is held while the spool is read, so that no report is counted twice.
	mu sync.Mutex

	operations map[string]*prometheus.CounterVec
	durations  map[string]prometheus.Histogram
	phases     *prometheus.HistogramVec
	frozen     prometheus.Histogram
	bytes      prometheus.Histogram
	running    *prometheus.GaugeVec
	oldest     *prometheus.GaugeVec
	size       *prometheus.GaugeVec
	invalid    prometheus.Counter
}

// New returns an exporter of a node's configuration.
func New(cfg *config.Config) *Exporter {
	seconds := prometheus.ExponentialBuckets(0.05, 2, 15) // to 14 minutes
	e := &Exporter{
		spool:    metrics.Spool{Dir: cfg.MetricsDir},
		stored:   map[string]string{"restore_dir": cfg.RestoreDir, "state_dir": cfg.StateDir},
		registry: prometheus.NewRegistry(),
		endpoint: cfg.TracesEndpoint,
		now:      time.Now,

		operations: map[string]*prometheus.CounterVec{
			metrics.Checkpoint: prometheus.NewCounterVec(prometheus.CounterOpts{
				Name: "kata_checkpoint_checkpoint_operations_total",
				Help: "Checkpoints that have ended, by their result and, of a failure, its reason: the name of the error's code.",
			}, []string{byResult, byReason}),
			metrics.Restore: prometheus.NewCounterVec(prometheus.CounterOpts{
				Name: "kata_checkpoint_restore_operations_total",
				Help: "Restores that have ended, by their result and, of a failure, its reason: the name of the error's code.",
			}, []string{byResult, byReason}),
		},
		durations: map[string]prometheus.Histogram{
			metrics.Checkpoint: prometheus.NewHistogram(prometheus.HistogramOpts{
				Name: "kata_checkpoint_checkpoint_duration_seconds", Help: "Time that successful checkpoints have taken in the shim.", Buckets: seconds,
			}),
			metrics.Restore: prometheus.NewHistogram(prometheus.HistogramOpts{
				Name: "kata_checkpoint_restore_duration_seconds", Help: "Time that successful restores have taken in the shim, without the start of the VM.", Buckets: seconds,
			}),
		},
		phases: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "kata_checkpoint_phase_duration_seconds", Help: "Time that each phase of successful checkpoints and restores has taken.",
			Buckets: prometheus.ExponentialBuckets(0.005, 2, 16),
		}, []string{byOperation, byPhase}),
		frozen: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "kata_checkpoint_frozen_seconds", Help: "Time for which containers were frozen for a checkpoint, from the freeze until they were thawed or stopped.", Buckets: seconds,
		}),
		bytes: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "kata_checkpoint_image_size_bytes", Help: "Size of the image sets of successful checkpoints.",
			Buckets: prometheus.ExponentialBuckets(1<<20, 4, 10), // to 256 GiB
		}),
		running: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "kata_checkpoint_operations_in_progress", Help: "Checkpoints and restores in progress.",
		}, []string{byOperation}),
		oldest: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "kata_checkpoint_oldest_operation_seconds", Help: "How long the oldest operation in progress has taken until now, 0 if there is none.",
		}, []string{byOperation}),
		size: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "kata_checkpoint_stored_bytes", Help: "Size of the files in the directories in which checkpoints are kept and transferred.",
		}, []string{byDirectory}),
		invalid: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "kata_checkpoint_invalid_reports_total", Help: "Files in the spool that were no reports of a shim.",
		}),
	}
	build := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "kata_checkpoint_build_info", Help: "The release of the process that serves these figures; the value is always 1.",
		ConstLabels: prometheus.Labels{"version": version.Version, "goversion": runtime.Version()},
	})
	build.Set(1)
	e.registry.MustRegister(e.phases, e.frozen, e.bytes, e.running, e.oldest, e.size, e.invalid, build)
	for _, operation := range []string{metrics.Checkpoint, metrics.Restore} {
		e.registry.MustRegister(e.operations[operation], e.durations[operation])
		// A rate needs a beginning.
		e.operations[operation].WithLabelValues(success, "")
		e.running.WithLabelValues(operation)
		e.oldest.WithLabelValues(operation)
	}
	return e
}

// Serve serves /metrics at an address until ctx ends: the path of a unix socket
// after "unix:", or a host and a port.
func (e *Exporter) Serve(ctx context.Context, address string) error {
	if err := e.spool.Open(); err != nil {
		return err
	}
	var err error
	if e.spans, err = newSpans(ctx, e.endpoint); err != nil {
		// The figures are as good without them.
		log.G(ctx).Error("no spans are exported: " + errcode.Text(err))
	}
	defer e.spans.close(ctx)
	listener, err := listen(ctx, address)
	if err != nil {
		return fmt.Errorf("metrics_address %s: %w", address, err)
	}
	log.G(ctx).WithField("address", address).Info("serving metrics")
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", e.Handler())
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second, BaseContext: func(net.Listener) context.Context { return ctx }}
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(listener) }()
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			e.read(ctx)
		case err := <-ended:
			return fmt.Errorf("serve metrics: %w", err)
		case <-ctx.Done():
			return errclass.Join(server.Close(), ignoreClosed(<-ended))
		}
	}
}

func ignoreClosed(err error) error {
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// socketPrefix precedes the path of a unix socket.
const socketPrefix = "unix:"

func listen(ctx context.Context, address string) (net.Listener, error) {
	var lc net.ListenConfig
	path, isSocket := strings.CutPrefix(address, socketPrefix)
	if !isSocket {
		return lc.Listen(ctx, "tcp", address)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	// Left by an earlier process. One that runs keeps its own socket, which has no
	// name any longer: there is one process of this kind on a node.
	if st, err := os.Lstat(path); err == nil && st.Mode()&fs.ModeSocket != 0 {
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	return lc.Listen(ctx, "unix", path)
}

// Handler answers a scrape.
func (e *Exporter) Handler() http.Handler {
	scrape := promhttp.HandlerFor(e.registry, promhttp.HandlerOpts{})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		e.read(r.Context())
		e.measure()
		scrape.ServeHTTP(w, r)
	})
}

// read counts what has been reported since it was last called.
func (e *Exporter) read(ctx context.Context) {
	e.mu.Lock()
	defer e.mu.Unlock()
	content, err := e.spool.Take()
	if err != nil {
		log.G(ctx).WithError(err).Warn("failed to read what shims have reported")
	}
	e.invalid.Add(float64(content.Invalid))
	for i := range content.Done {
		e.count(&content.Done[i])
		e.spans.report(ctx, &content.Done[i])
	}
	running := map[string]int{}
	oldest := map[string]float64{}
	for _, r := range content.Running {
		if e.operations[r.Operation] == nil {
			continue
		}
		running[r.Operation]++
		oldest[r.Operation] = max(oldest[r.Operation], e.now().Sub(r.Begin).Seconds())
	}
	for operation := range e.operations {
		e.running.WithLabelValues(operation).Set(float64(running[operation]))
		e.oldest.WithLabelValues(operation).Set(oldest[operation])
	}
}

func (e *Exporter) count(r *metrics.Report) {
	if r.Operation == metrics.Frozen {
		e.frozen.Observe(r.Seconds)
		return
	}
	operations := e.operations[r.Operation]
	if operations == nil || r.Seconds < 0 || r.Bytes < 0 {
		e.invalid.Inc()
		return
	}
	if r.Reason != metrics.Success {
		operations.WithLabelValues(failure, reason(r.Reason)).Inc()
		return
	}
	operations.WithLabelValues(success, "").Inc()
	e.durations[r.Operation].Observe(r.Seconds)
	if r.Operation == metrics.Checkpoint {
		e.bytes.Observe(float64(r.Bytes))
	}
	for _, p := range r.Phases {
		if p.Seconds >= 0 {
			e.phases.WithLabelValues(r.Operation, metrics.PhaseName(p.Name)).Observe(p.Seconds)
		}
	}
}

// reason is a reason that this release knows. A shim of another release may have
// others.
func reason(name string) string {
	for _, entry := range errcode.All() {
		if entry.Name == name {
			return name
		}
	}
	return "other"
}

// measure measures the directories.
func (e *Exporter) measure() {
	for name, dir := range e.stored {
		if bytes, err := sizeOf(dir); err == nil {
			e.size.WithLabelValues(name).Set(float64(bytes))
		}
	}
}

// sizeOf is what the regular files in a directory occupy, in bytes. What is
// removed meanwhile is left out.
func sizeOf(dir string) (bytes int64, err error) {
	if _, err := os.Stat(dir); err != nil {
		return 0, err
	}
	err = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil //nolint:nilerr // removed meanwhile
		}
		if d.Type().IsRegular() {
			if info, err := d.Info(); err == nil {
				bytes += info.Size()
			}
		}
		return nil
	})
	return bytes, err
}
