// SPDX-License-Identifier: Apache-2.0

package exporter

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/kata-checkpoint/kata-checkpoint/internal/config"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/metrics"
)

func newExporter(t *testing.T) (*Exporter, metrics.Spool) {
	t.Helper()
	dir := t.TempDir()
	cfg := &config.Config{MetricsDir: filepath.Join(dir, "spool"), RestoreDir: filepath.Join(dir, "restore"), StateDir: filepath.Join(dir, "state")}
	if err := os.MkdirAll(filepath.Join(cfg.RestoreDir, "below"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"a.tar", "below/b.tar"} {
		if err := os.WriteFile(filepath.Join(cfg.RestoreDir, name), make([]byte, 1000), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s := metrics.Spool{Dir: cfg.MetricsDir}
	if err := s.Open(); err != nil {
		t.Fatal(err)
	}
	return New(cfg), s
}

func scrape(t *testing.T, h http.Handler) string {
	t.Helper()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	if w.Code != http.StatusOK {
		t.Fatalf("status %d: %s", w.Code, w.Body)
	}
	return w.Body.String()
}

// What shims report is counted, once, by what happened.
func TestFigures(t *testing.T) {
	e, spool := newExporter(t)
	spool.Begin(metrics.Checkpoint).End(metrics.Report{Seconds: 2, Bytes: 5 << 20, Phases: []metrics.Phase{
		{Name: "freeze", Seconds: 0.5}, {Name: "made up by a guest", Seconds: 1}, {Name: "made up as well", Seconds: -1},
	}}, nil)
	for range 2 {
		spool.Begin(metrics.Checkpoint).End(metrics.Report{Seconds: 1}, errcode.IOUring.Wrap(errors.New("x")))
	}
	spool.Begin(metrics.Restore).End(metrics.Report{}, errors.New("something"))
	spool.Report(metrics.Report{Operation: metrics.Restore, Reason: "of a later release"})
	spool.Report(metrics.Report{Operation: metrics.Frozen, Seconds: 3})
	spool.Report(metrics.Report{Operation: "unknown"})
	running := spool.Begin(metrics.Restore)
	defer running.Drop()
	for range 2 { // the second time, nothing is new
		text := scrape(t, e.Handler())
		for _, want := range []string{
			`kata_checkpoint_checkpoint_operations_total{reason="",result="success"} 1`,
			`kata_checkpoint_checkpoint_operations_total{reason="io-uring",result="failure"} 2`,
			`kata_checkpoint_restore_operations_total{reason="",result="success"} 0`,
			`kata_checkpoint_restore_operations_total{reason="failed",result="failure"} 1`,
			`kata_checkpoint_restore_operations_total{reason="other",result="failure"} 1`,
			`kata_checkpoint_checkpoint_duration_seconds_sum 2`,
			`kata_checkpoint_checkpoint_duration_seconds_count 1`,
			`kata_checkpoint_phase_duration_seconds_sum{operation="checkpoint",phase="freeze"} 0.5`,
			`kata_checkpoint_phase_duration_seconds_sum{operation="checkpoint",phase="other"} 1`,
			`kata_checkpoint_frozen_seconds_sum 3`,
			`kata_checkpoint_image_size_bytes_sum 5.24288e+06`,
			`kata_checkpoint_operations_in_progress{operation="checkpoint"} 0`,
			`kata_checkpoint_operations_in_progress{operation="restore"} 1`,
			`kata_checkpoint_stored_bytes{directory="restore_dir"} 2000`,
			`kata_checkpoint_invalid_reports_total 1`,
			`kata_checkpoint_build_info{`,
		} {
			if !strings.Contains(text, want) {
				t.Errorf("%q is missing", want)
			}
		}
		if strings.Contains(text, "state_dir") || strings.Contains(text, "made up") {
			t.Error("there is a figure of what does not exist")
		}
		if t.Failed() {
			t.Fatal(text)
		}
	}
}

// The names are as Prometheus has them.
func TestLint(t *testing.T) {
	e, spool := newExporter(t)
	spool.Begin(metrics.Checkpoint).End(metrics.Report{Bytes: 1, Phases: []metrics.Phase{{Name: "freeze"}}}, nil)
	scrape(t, e.Handler())
	problems, err := testutil.GatherAndLint(e.registry)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	families, err := e.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	if len(families) < 12 {
		t.Errorf("only %d figures", len(families))
	}
	for _, f := range families {
		if !strings.HasPrefix(f.GetName(), "kata_checkpoint_") || f.GetHelp() == "" {
			t.Errorf("%s: %q", f.GetName(), f.GetHelp())
		}
	}
}

// It is served at a socket and at a port, and takes over a socket that an earlier
// process has left.
func TestServe(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "run", "metrics.sock")
	for _, address := range []string{socketPrefix + socket, socketPrefix + socket, "127.0.0.1:0"} {
		e, spool := newExporter(t)
		spool.Report(metrics.Report{Operation: metrics.Frozen, Seconds: 1})
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- e.Serve(ctx, address) }()
		if strings.HasPrefix(address, socketPrefix) {
			client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				for {
					c, err := new(net.Dialer).DialContext(ctx, "unix", socket)
					if err == nil || ctx.Err() != nil {
						return c, err
					}
				}
			}}}
			resp, err := client.Get("http://node/metrics")
			if err != nil {
				t.Fatal(err)
			}
			text, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if err != nil || !strings.Contains(string(text), "kata_checkpoint_frozen_seconds_count 1") {
				t.Errorf("%s: %v: %s", address, err, text)
			}
			client.CloseIdleConnections()
		}
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("%s: %v", address, err)
		}
	}
	e, _ := newExporter(t)
	if err := e.Serve(t.Context(), "no address"); err == nil || !strings.Contains(err.Error(), "metrics_address") {
		t.Errorf("%v", err)
	}
}
