// SPDX-License-Identifier: Apache-2.0

package kataconfig

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

const base = `
[hypervisor.clh]
path = "/opt/kata/bin/cloud-hypervisor"
kernel = "/opt/kata/share/vmlinux.container"
kernel_params = "quiet"
shared_fs = "virtio-fs"
[agent.kata]
dial_timeout = 90
[runtime]
sandbox_bind_mounts = ["/a", "/b"]
`

func TestLoadMergesDropInsInOrder(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "defaults/configuration-clh.toml"), base)
	// An administrator's link: the drop-ins are beside what it leads to.
	if err := os.Symlink("defaults/configuration-clh.toml", filepath.Join(dir, "configuration.toml")); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "config.d/ignored.toml"), "[runtime]\nsandbox_bind_mounts = [\"/wrong\"]\n")
	d := filepath.Join(dir, "defaults/config.d")
	write(t, filepath.Join(d, "50-ours.toml"), "[hypervisor.clh]\nguest_hook_path = \"/h\"\nkernel = \"/k1\"\n[runtime]\nsandbox_bind_mounts = [\"/ours\"]\n")
	write(t, filepath.Join(d, "60-theirs.toml"), "[hypervisor.clh]\nkernel = \"/k2\"\n")
	for _, shim := range []Shim{Go, Rust} {
		c, err := Load(filepath.Join(dir, "configuration.toml"), shim)
		if err != nil {
			t.Fatal(err)
		}
		want := &Config{
			Path:              filepath.Join(dir, "defaults/configuration-clh.toml"),
			DropIns:           []string{filepath.Join(d, "50-ours.toml"), filepath.Join(d, "60-theirs.toml")},
			Hypervisor:        "clh",
			SharedFS:          "virtio-fs",
			Kernel:            "/k2",
			KernelParams:      "quiet",
			GuestHookPath:     "/h",
			SandboxBindMounts: []string{"/ours"},
		}
		if diff := cmp.Diff(want, c); diff != "" {
			t.Errorf("%s (-want +got):\n%s", shim, diff)
		}
	}
}

func TestLinkedDropIn(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "configuration.toml")
	write(t, path, base)
	write(t, filepath.Join(dir, "x.toml"), "[hypervisor.clh]\nkernel = \"/linked\"\n")
	write(t, filepath.Join(dir, "config.d/50-a.toml"), "")
	if err := os.Symlink("../x.toml", filepath.Join(dir, "config.d/60-b.toml")); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(path, Rust); !errors.Is(err, ErrLink) {
		t.Errorf("Rust: got %v, want ErrLink", err)
	}
	c, err := Load(path, Go)
	if err != nil || c.Kernel != "/linked" {
		t.Errorf("Go: got %+v, %v", c, err)
	}
}

func TestLoadErrors(t *testing.T) {
	for name, text := range map[string]string{
		"syntax":        "[hypervisor",
		"no hypervisor": "[runtime]\n",
		"wrong type":    "[hypervisor.clh]\nkernel = 1\n",
		"wrong element": "[hypervisor.clh]\n[runtime]\nsandbox_bind_mounts = [1]\n",
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "configuration.toml")
			write(t, path, text)
			if c, err := Load(path, Go); err == nil {
				t.Errorf("accepted: %+v", c)
			}
		})
	}
}

func TestHookPath(t *testing.T) {
	for shim, want := range map[Shim]string{
		Go:   "/run/kata-containers/shared/containers/sandbox-mounts/guest/hooks",
		Rust: "/run/kata-containers/shared/containers/passthrough/sandbox-mounts/guest/hooks",
	} {
		if got := shim.HookPath("/opt/kata-checkpoint/guest"); got != want {
			t.Errorf("%s: %s, want %s", shim, got, want)
		}
	}
}
