// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"bytes"
	"errors"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kata-checkpoint/kata-checkpoint/integration/parts"
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
