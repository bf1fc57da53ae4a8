// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/kata-checkpoint/kata-checkpoint/integration/parts"
	"github.com/kata-checkpoint/kata-checkpoint/internal/config"
)

// TestHelmChart renders the chart in configs/helm, and checks that the command
// takes the flags that the chart gives it.
func TestHelmChart(t *testing.T) {
	if core {
		t.Skip("builds helm, which takes minutes")
	}
	p, err := parts.Find()
	if err != nil {
		t.Fatal(err)
	}
	helm, err := p.Helm(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	chart, err := filepath.Abs("../configs/helm/kata-checkpoint")
	if err != nil {
		t.Fatal(err)
	}
	run := func(args ...string) (string, error) {
		out, err := exec.CommandContext(t.Context(), helm, append(args, "--kube-version", "1.34.0")...).CombinedOutput()
		return string(out), err
	}
	if out, err := run("lint", "--strict", chart); err != nil {
		t.Errorf("lint: %v: %s", err, out)
	}
	for name, c := range map[string]struct {
		set          []string
		want, absent []string
	}{
		"defaults": {
			nil,
			[]string{"kind: DaemonSet", "kind: RuntimeClass", "handler: kata-checkpoint", "--nri-plugins=/opt/nri/plugins", "--restart-containerd", "hostPID: true"},
			[]string{"--kata-config", "--kernel", "metrics"},
		},
		"all values": {
			[]string{"kata.shim=/s", "kata.config=/c", "kernel=/k", "containerd.config=/d", "nri.enabled=false", "restartContainerd=false", "runtimeClass.enabled=false", "nodeSelector=null"},
			[]string{"--kata-shim=/s", "--kata-config=/c", "--kernel=/k", "--containerd-config=/d", "--nri-plugins=\n"},
			[]string{"RuntimeClass", "--restart-containerd", "nodeSelector"},
		},
		"metrics": {
			[]string{"metrics.enabled=true", "metrics.port=9000", "metrics.restoreDir=/archives"},
			[]string{"--metrics-only", "--metrics-address=:9000", "containerPort: 9000", "name: metrics", "path: /archives", "path: /run/kata-checkpoint\n"},
			nil,
		},
		"uninstall": {[]string{"mode=uninstall"}, []string{"- uninstall", "--root=/host", "--wait"}, []string{"--from", "RuntimeClass"}},
	} {
		args := []string{"template", "kc", chart}
		for _, v := range c.set {
			args = append(args, "--set", v)
		}
		out, err := run(args...)
		if err != nil {
			t.Errorf("%s: %v: %s", name, err, out)
			continue
		}
		for _, w := range c.want {
			if !strings.Contains(out, w) {
				t.Errorf("%s: %q is missing: %s", name, w, out)
			}
		}
		for _, w := range c.absent {
			if strings.Contains(out, w) {
				t.Errorf("%s: there is %q: %s", name, w, out)
			}
		}
		if name == "metrics" {
			checkMetricsContainer(t, p, out)
		}
		// In a root without Kata the command fails, but not because of a flag.
		var command []string
		for line := range strings.Lines(out) {
			if arg, ok := strings.CutPrefix(strings.TrimSpace(line), "- "); ok && (strings.HasPrefix(arg, "--") && !strings.HasPrefix(arg, "--metrics") || arg == "install" || arg == "uninstall") {
				command = append(command, arg)
			}
		}
		for i, arg := range command {
			if arg == "--root=/host" {
				command[i] = "--root=" + t.TempDir()
			}
		}
		command = slices.DeleteFunc(command, func(arg string) bool { return arg == "--wait" })
		var stderr bytes.Buffer
		cmd := exec.CommandContext(t.Context(), p.Bin("kata-checkpoint"), command...)
		cmd.Stderr = &stderr
		var exit *exec.ExitError
		if err := cmd.Run(); !errors.As(err, &exit) || strings.Contains(stderr.String(), "flag") || !strings.Contains(stderr.String(), "install") {
			t.Errorf("%s: %v: %v: %s", name, command, err, stderr.String())
		}
	}
	if out, err := run("template", "kc", chart, "--set", "mode=other"); err == nil || !strings.Contains(out, "install or uninstall") {
		t.Errorf("an unknown mode: %v: %s", err, out)
	}
}

// container is a part of a container in a rendered chart.
type container struct {
	Name, Image   string
	Command, Args []string
	Ports         []struct {
		Name          string
		ContainerPort int
	}
	VolumeMounts []struct{ Name, MountPath string }
}

// checkMetricsContainer has the program do what the chart's metrics container does:
// it serves figures at the port that the container has, from what is mounted.
func checkMetricsContainer(t *testing.T, p *parts.Parts, rendered string) {
	t.Helper()
	var found *container
	for document := range strings.SplitSeq(rendered, "\n---\n") {
		var set struct {
			Spec struct {
				Template struct {
					Spec struct{ Containers []container }
				}
			}
		}
		if err := yaml.Unmarshal([]byte(document), &set); err != nil {
			t.Fatalf("%v: %s", err, document)
		}
		containers := set.Spec.Template.Spec.Containers
		if i := slices.IndexFunc(containers, func(c container) bool { return c.Name == "metrics" }); i >= 0 {
			found = &containers[i]
		}
	}
	if found == nil || len(found.Command) != 1 || len(found.Ports) != 1 {
		t.Fatalf("the metrics container is %+v", found)
	}
	defaults, err := config.Load(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{defaults.MetricsDir, defaults.RestoreDir} {
		if !slices.ContainsFunc(found.VolumeMounts, func(m struct{ Name, MountPath string }) bool {
			return dir == m.MountPath || strings.HasPrefix(dir, m.MountPath+"/")
		}) {
			t.Errorf("%s is not mounted in the metrics container: %+v", dir, found.VolumeMounts)
		}
	}

	// Elsewhere, so that nobody is in the way.
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := free.Addr().String()
	free.Close()
	settings := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(settings, fmt.Appendf(nil, "metrics_dir = %q\n", t.TempDir()), 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{"--config", settings}
	for _, arg := range found.Args {
		args = append(args, strings.Replace(arg, fmt.Sprintf("=:%d", found.Ports[0].ContainerPort), "="+address, 1))
	}
	if !slices.Contains(args, "--metrics-address="+address) {
		t.Fatalf("it does not serve the container's port: %q", found.Args)
	}
	var stderr bytes.Buffer
	cmd := exec.CommandContext(t.Context(), p.Bin(filepath.Base(found.Command[0])), args...)
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Wait() }()
	defer func() { _ = cmd.Process.Kill() }()
	var text string
	if !poll(t.Context(), 30*time.Second, func() bool {
		response, err := http.Get("http://" + address + "/metrics")
		if err != nil {
			return false
		}
		defer response.Body.Close()
		body, err := io.ReadAll(response.Body)
		text = string(body)
		return err == nil && response.StatusCode == http.StatusOK
	}) {
		t.Fatalf("%v %q serves nothing: %s", found.Command, args, stderr.String())
	}
	if !strings.Contains(text, "kata_checkpoint_build_info") {
		t.Errorf("it serves %s", text)
	}
}
