// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"maps"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/pelletier/go-toml/v2"
)

// Excerpts of what Kata's own builds generate for Cloud Hypervisor.
const (
	kataGo = `# Copyright
[hypervisor.clh]
path = "/usr/bin/cloud-hypervisor"
kernel = "/usr/share/kata-containers/vmlinux.container"
image = "/usr/share/kata-containers/kata-containers.img"
# rootfs filesystem type:
#   - ext4 (default)
rootfs_type = "ext4"
#initrd = "none"
valid_hypervisor_paths = ["/usr/bin/cloud-hypervisor"]
kernel_params = "cgroup_no_v1=all"
default_memory = 2048
virtio_fs_daemon = "/usr/libexec/virtiofsd"
valid_virtio_fs_daemon_paths = ["/usr/libexec/virtiofsd"]
disable_seccomp = false
#guest_hook_path = "/usr/share/oci/hooks"
guest_hook_path = ""

[agent.kata]
debug_console_enabled = false
dial_timeout = 45

[runtime]
internetworking_model = "tcfilter"
sandbox_bind_mounts = []
create_container_timeout = 60
`
	kataRust = `[hypervisor.cloud-hypervisor]
path = "/usr/bin/cloud-hypervisor"
kernel = "/usr/share/kata-containers/vmlinux.container"
image = "/usr/share/kata-containers/kata-containers.img"
vm_rootfs_driver = "virtio-blk-pci"
kernel_params = ""
[hypervisor.cloud-hypervisor.factory]
enable_template = false
[agent.kata]
dial_timeout_ms = 10
reconnect_timeout_ms = 3000
create_container_timeout = 30
[runtime]
name = "virt_container"
hypervisor_name = "cloud-hypervisor"
`
)

func TestDeriveKataConfig(t *testing.T) {
	settings := kataSettings{
		VMM: "/d/bin/testbed-vmm", Virtiofsd: "/d/bin/testbed-virtiofsd", Kernel: "/boot/k", Initrd: "/b/i.cpio", GuestMounts: Shared, GuestBundle: "/d/bundle",
	}
	hypervisor := func(more map[string]any) map[string]any {
		out := map[string]any{
			"path": "/d/bin/testbed-vmm", "valid_hypervisor_paths": []any{"/d/bin/testbed-vmm"}, "kernel": "/boot/k", "initrd": "/b/i.cpio",
			"virtio_fs_daemon": "/d/bin/testbed-virtiofsd", "valid_virtio_fs_daemon_paths": []any{"/d/bin/testbed-virtiofsd"},
			"default_memory": int64(1536), "disable_seccomp": true,
		}
		maps.Copy(out, more)
		return out
	}
	for _, tc := range []struct {
		name          string
		configuration string
		change        func(*kataSettings)
		way           Way
		want          map[string]any
	}{{
		name: "Kata's Go shim", configuration: kataGo, way: Go,
		want: map[string]any{
			"hypervisor": map[string]any{"clh": hypervisor(map[string]any{
				"kernel_params":   "cgroup_no_v1=all testbed.mounts=shared",
				"guest_hook_path": "/run/kata-containers/shared/containers/sandbox-mounts/bundle/hooks",
			})},
			"agent":   map[string]any{"kata": map[string]any{"debug_console_enabled": true, "dial_timeout": int64(90)}},
			"runtime": map[string]any{"internetworking_model": "tcfilter", "sandbox_bind_mounts": []any{"/d/bundle"}, "create_container_timeout": int64(90)},
		},
	}, {
		name: "Kata's Rust shim, private mounts, no network", configuration: kataRust, way: Rust,
		change: func(s *kataSettings) { s.GuestMounts, s.NoNetwork = Private, true },
		want: map[string]any{
			"hypervisor": map[string]any{"cloud-hypervisor": hypervisor(map[string]any{
				"kernel_params":   "testbed.mounts=private",
				"guest_hook_path": "/run/kata-containers/shared/containers/passthrough/sandbox-mounts/bundle/hooks",
				"factory":         map[string]any{"enable_template": false},
			})},
			"agent": map[string]any{"kata": map[string]any{
				"debug_console_enabled": true, "dial_timeout_ms": int64(500), "reconnect_timeout_ms": int64(60000), "create_container_timeout": int64(90),
			}},
			"runtime": map[string]any{
				"name": "virt_container", "hypervisor_name": "cloud-hypervisor", "sandbox_bind_mounts": []any{"/d/bundle"},
				"disable_new_netns": true, "internetworking_model": "none",
			},
		},
	}, {
		name: "without our agent", configuration: kataGo, way: Go,
		change: func(s *kataSettings) { s.GuestBundle = "" },
		want: map[string]any{
			"hypervisor": map[string]any{"clh": hypervisor(map[string]any{"kernel_params": "cgroup_no_v1=all testbed.mounts=shared", "guest_hook_path": ""})},
			"agent":      map[string]any{"kata": map[string]any{"debug_console_enabled": true, "dial_timeout": int64(90)}},
			"runtime":    map[string]any{"internetworking_model": "tcfilter", "sandbox_bind_mounts": []any{}, "create_container_timeout": int64(90)},
		},
	}} {
		t.Run(tc.name, func(t *testing.T) {
			s := settings
			s.Way = wayOf(tc.configuration)
			if s.Way != tc.way {
				t.Fatalf("way %s, want %s", s.Way, tc.way)
			}
			if tc.change != nil {
				tc.change(&s)
			}
			text, err := deriveKataConfig(tc.configuration, s)
			if err != nil {
				t.Fatal(err)
			}
			var got map[string]any
			if err := toml.Unmarshal([]byte(text), &got); err != nil {
				t.Fatalf("%v in\n%s", err, text)
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("-want +got\n%s", diff)
			}
		})
	}
	if _, err := deriveKataConfig("[runtime]\n", settings); err == nil {
		t.Error("a configuration without a hypervisor is taken")
	}
}

func TestStandinConfigurationsAreOfTheirWay(t *testing.T) {
	for configuration, want := range map[string]Way{standinGo: Go, standinRust: Rust} {
		if got := wayOf(configuration); got != want {
			t.Errorf("way %s, want %s, of\n%s", got, want, configuration)
		}
		text, err := deriveKataConfig(configuration, kataSettings{Way: want, GuestMounts: Shared, GuestBundle: "/d/bundle"})
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(text, "testbed.mounts=shared") {
			t.Errorf("no kernel parameter in\n%s", text)
		}
	}
}
