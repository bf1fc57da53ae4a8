// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/prometheus/promql/parser"
	"sigs.k8s.io/yaml"
)

// figure is the name of a figure of ours.
var figure = regexp.MustCompile(`^kata_checkpoint_[a-z_]+$`)

// figures are those that package internal/exporter serves, by their types.
func figures(t *testing.T) map[string]string {
	t.Helper()
	source, err := os.ReadFile("../internal/exporter/exporter.go")
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, m := range regexp.MustCompile(`prometheus\.(\w+)Opts\{\s*Name: "(kata_checkpoint_\w+)"`).FindAllStringSubmatch(string(source), -1) {
		out[m[2]] = m[1]
	}
	if len(out) < 12 {
		t.Fatalf("only %d figures are served: %v", len(out), out)
	}
	return out
}

// checkQuery checks that Prometheus can parse a query, and that what it asks for
// is served.
func checkQuery(t *testing.T, served map[string]string, where, query string) (asked []string) {
	t.Helper()
	expr, err := parser.NewParser(parser.Options{}).ParseExpr(query)
	if err != nil {
		t.Errorf("%s: %v: %s", where, err, query)
		return nil
	}
	parser.Inspect(expr, func(n parser.Node, _ []parser.Node) error {
		v, ok := n.(*parser.VectorSelector)
		if !ok {
			return nil
		}
		name := v.Name
		for _, suffix := range []string{"_bucket", "_sum", "_count"} {
			if base := strings.TrimSuffix(name, suffix); served[base] == "Histogram" {
				name = base
			}
		}
		if served[name] == "" || served[name] == "Histogram" && name == v.Name {
			t.Errorf("%s: nothing serves %s", where, v.Name)
		}
		asked = append(asked, name)
		return nil
	})
	return asked
}

// TestDashboard checks each query of the Grafana dashboard, and that it shows all
// there is.
func TestDashboard(t *testing.T) {
	data, err := os.ReadFile("../configs/grafana/kata-checkpoint.json")
	if err != nil {
		t.Fatal(err)
	}
	var dashboard struct {
		UID, Title string
		Panels     []struct {
			ID      int
			Title   string
			GridPos struct{ X, Y, W, H int }
			Targets []struct{ Expr, RefID string }
		}
		Templating struct {
			List []struct {
				Name  string
				Query json.RawMessage
			}
		}
	}
	if err := json.Unmarshal(data, &dashboard); err != nil {
		t.Fatal(err)
	}
	served := figures(t)
	shown := map[string]bool{}
	ids := map[int]bool{}
	taken := map[[2]int]string{}
	for _, p := range dashboard.Panels {
		if ids[p.ID] || p.Title == "" || len(p.Targets) == 0 {
			t.Errorf("panel %d, %q, is one of several with its ID, has no title or asks for nothing", p.ID, p.Title)
		}
		ids[p.ID] = true
		for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
			for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
				if other := taken[[2]int{x, y}]; other != "" || x >= 24 {
					t.Fatalf("the panel %q lies over %q or outside", p.Title, other)
				}
				taken[[2]int{x, y}] = p.Title
			}
		}
		for _, target := range p.Targets {
			query := strings.NewReplacer("$__rate_interval", "5m", "$node", ".*").Replace(target.Expr)
			for _, name := range checkQuery(t, served, p.Title, query) {
				shown[name] = true
			}
		}
	}
	for _, v := range dashboard.Templating.List {
		if v.Name == "node" && !strings.Contains(string(v.Query), "kata_checkpoint_build_info") {
			t.Errorf("the nodes are taken from %s", v.Query)
		}
	}
	for name := range served {
		if !shown[name] && name != "kata_checkpoint_invalid_reports_total" && name != "kata_checkpoint_oldest_operation_seconds" {
			t.Errorf("no panel shows %s", name)
		}
	}
}

// TestAlerts checks each alert's expression, and that docs/metrics.md has it.
func TestAlerts(t *testing.T) {
	var rule struct {
		Kind string
		Spec struct {
			Groups []struct {
				Name  string
				Rules []struct {
					Alert, Expr         string
					Labels, Annotations map[string]string
				}
			}
		}
	}
	readYAML(t, "../configs/prometheus/rules.yaml", &rule)
	page, err := os.ReadFile("../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	served := figures(t)
	alerts := 0
	for _, g := range rule.Spec.Groups {
		for _, r := range g.Rules {
			alerts++
			if len(checkQuery(t, served, r.Alert, r.Expr)) == 0 {
				t.Errorf("%s asks for nothing", r.Alert)
			}
			if r.Annotations["summary"] == "" || r.Labels["severity"] == "" || !strings.Contains(string(page), "| `"+r.Alert+"` |") {
				t.Errorf("%s lacks a summary, a severity or its row in docs/metrics.md", r.Alert)
			}
		}
	}
	if rule.Kind != "PrometheusRule" || alerts < 4 {
		t.Errorf("%s with %d alerts", rule.Kind, alerts)
	}
}

// TestPodMonitor checks that what is scraped exists.
func TestPodMonitor(t *testing.T) {
	var monitor struct {
		Kind string
		Spec struct {
			Selector struct {
				MatchExpressions []struct {
					Key    string
					Values []string
				}
			}
			PodMetricsEndpoints []struct{ Port string }
		}
	}
	readYAML(t, "../configs/prometheus/podmonitor.yaml", &monitor)
	if monitor.Kind != "PodMonitor" || len(monitor.Spec.PodMetricsEndpoints) != 1 || len(monitor.Spec.Selector.MatchExpressions) != 1 {
		t.Fatalf("%+v", monitor)
	}
	port := "name: " + monitor.Spec.PodMetricsEndpoints[0].Port
	selector := monitor.Spec.Selector.MatchExpressions[0]
	for label, file := range map[string]string{
		"kata-checkpoint":     "../configs/helm/kata-checkpoint/templates/daemonset.yaml",
		"kata-checkpoint-nri": "../configs/kubernetes/nri-daemonset.yaml",
	} {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Contains(selector.Values, label) || !strings.Contains(string(data), selector.Key+": "+label+"\n") || !strings.Contains(string(data), port) {
			t.Errorf("%s has no pod with %s: %s and a port with %s", filepath.Base(file), selector.Key, label, port)
		}
	}
}

// TestMetricsPage checks that docs/metrics.md has each figure and no other.
func TestMetricsPage(t *testing.T) {
	page, err := os.ReadFile("../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	served := figures(t)
	listed := map[string]bool{}
	for _, m := range regexp.MustCompile("(?m)^\\| `(kata_checkpoint_[a-z_]+)`").FindAllStringSubmatch(string(page), -1) {
		if served[m[1]] == "" {
			t.Errorf("docs/metrics.md has %s, which nothing serves", m[1])
		}
		listed[m[1]] = true
	}
	for name := range served {
		if !listed[name] || !figure.MatchString(name) {
			t.Errorf("docs/metrics.md does not have %s", name)
		}
	}
}

func readYAML(t *testing.T, path string, v any) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(data, v); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
}
