// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// host is a directory with a release, containerd and Kata, and a systemctl that
// writes down what it is told.
type host struct {
	t   *testing.T
	dir string
	// written is called with each line of output, if it is set.
	written func()
}

func newHost(t *testing.T) *host {
	h := &host{t: t, dir: t.TempDir()}
	for _, name := range []string{
		"release/bin/containerd-shim-kata-checkpoint-v2", "release/bin/kata-checkpoint", "release/bin/kata-checkpoint-nri",
		"release/guest-bundle/bin/kata-checkpoint-agent", "containerd-shim-kata-v2",
	} {
		h.write(name, "#!/bin/sh\necho '(Golang): version: 4.1.0'\n")
	}
	h.write("kata.toml", "[hypervisor.clh]\nshared_fs = 'virtio-fs'\nkernel = '"+h.path("kata.toml")+"'\n")
	h.write("containerd/config.toml", "version = 3\nimports = ['conf.d/*.toml']\n")
	h.write("proc/self/mountinfo", "")
	h.write("bin/systemctl", "#!/bin/sh\necho \"$@\" >> "+h.path("systemctl.log")+"\n")
	t.Setenv("PATH", h.path("bin")+":"+os.Getenv("PATH"))
	return h
}

func (h *host) path(name string) string { return filepath.Join(h.dir, name) }

func (h *host) write(name, text string) {
	h.t.Helper()
	if err := os.MkdirAll(filepath.Dir(h.path(name)), 0o755); err != nil {
		h.t.Fatal(err)
	}
	if err := os.WriteFile(h.path(name), []byte(text), 0o755); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) systemctl() string {
	data, err := os.ReadFile(h.path("systemctl.log"))
	if err != nil {
		return ""
	}
	return string(data)
}

// run runs the command with the host's paths.
func (h *host) run(ctx context.Context, args ...string) (status int, out string) {
	h.t.Helper()
	args = append(args, "--dir", h.path("opt"), "--bin-dir", h.path("bin"), "--config", h.path("etc/config.toml"), "--proc", h.path("proc"))
	if args[0] == "install" {
		args = append(args, "--from", h.path("release"), "--containerd-config", h.path("containerd/config.toml"), "--containerd-path", h.path("bin"),
			"--kata-shim", h.path("containerd-shim-kata-v2"), "--kata-config", h.path("kata.toml"), "--nri-plugins", h.path("nri"))
	}
	b := &output{host: h}
	status = Run(ctx, args, b, b)
	return status, b.String()
}

type output struct {
	bytes.Buffer
	host *host
}

func (o *output) Write(p []byte) (int, error) {
	if o.host.written != nil {
		o.host.written()
	}
	return o.Buffer.Write(p)
}

func TestInstallRestartsContainerdOnce(t *testing.T) {
	h := newHost(t)
	if status, out := h.run(t.Context(), "install", "--dry-run", "--restart-containerd"); status != 0 || h.systemctl() != "" || !strings.Contains(out, "+++ b"+h.path("containerd/conf.d/kata-checkpoint.toml")) {
		t.Fatalf("a dry run: %d, %q: %s", status, h.systemctl(), out)
	}
	status, out := h.run(t.Context(), "install", "--restart-containerd")
	if status != 0 || h.systemctl() != "restart containerd\n" || !strings.Contains(out, "kind: RuntimeClass") || strings.Contains(out, "to do: systemctl") {
		t.Fatalf("%d, %q: %s", status, h.systemctl(), out)
	}
	if status, out := h.run(t.Context(), "install", "--restart-containerd"); status != 0 || h.systemctl() != "restart containerd\n" || !strings.Contains(out, "nothing to do") {
		t.Errorf("a second time: %d, %q: %s", status, h.systemctl(), out)
	}
	if status, out := h.run(t.Context(), "uninstall"); status != 0 || !strings.Contains(out, "to do: systemctl restart containerd") {
		t.Errorf("uninstall: %d: %s", status, out)
	}
	if status, out := h.run(t.Context(), "uninstall"); status != exitError || !strings.Contains(out, "has not installed anything") {
		t.Errorf("a second uninstall: %d: %s", status, out)
	}
}

// What is left to do is a warning for people, and not for a DaemonSet, which
// waits until its pod is deleted.
func TestInstallWithSomethingLeft(t *testing.T) {
	h := newHost(t)
	h.write("containerd/config.toml", "version = 3\n")
	if status, out := h.run(t.Context(), "install"); status != exitWarning || !strings.Contains(out, "to do: add the line imports") {
		t.Errorf("%d: %s", status, out)
	}
	for _, command := range []string{"install", "uninstall", "uninstall"} {
		ctx, cancel := context.WithCancel(t.Context())
		h.written = cancel // the pod is deleted
		if command == "uninstall" {
			cancel() // it may have nothing to say
		}
		if status, out := h.run(ctx, command, "--wait"); status != 0 {
			t.Errorf("%s: %d: %s", command, status, out)
		}
		cancel()
	}
}

func TestInstallThatCannotRestart(t *testing.T) {
	h := newHost(t)
	h.write("bin/systemctl", "#!/bin/sh\necho no bus >&2; exit 1\n")
	if status, out := h.run(t.Context(), "install", "--restart-containerd"); status != exitError || !strings.Contains(out, "no bus") {
		t.Errorf("%d: %s", status, out)
	}
}

func TestCheckTakesOneOfTwo(t *testing.T) {
	var b bytes.Buffer
	if status := Run(t.Context(), []string{"check", "--guest", "c1"}, &b, &b); status != exitError || !strings.Contains(b.String(), "leave CONTAINER out") {
		t.Errorf("%d: %s", status, b.String())
	}
}
