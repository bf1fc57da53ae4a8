// SPDX-License-Identifier: Apache-2.0

package config

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/way"
)

const common = `
path = "/usr/bin/vmm"
kernel = "/boot/vmlinuz"
initrd = "/boot/guest.cpio"
virtio_fs_daemon = "/usr/libexec/virtiofsd"
kernel_params = "quiet"
default_memory = 1536
guest_hook_path = "/hooks"
`

func TestTheFileTellsTheWay(t *testing.T) {
	base := Config{
		VMM: "/usr/bin/vmm", Kernel: "/boot/vmlinuz", Initrd: "/boot/guest.cpio", VirtioFSD: "/usr/libexec/virtiofsd",
		KernelParams: "quiet", MemoryMiB: 1536, VCPUs: 1, HookPath: "/hooks",
	}
	goWant, rustWant := base, base
	goWant.Way, goWant.DialTimeout, goWant.DebugConsole = way.Go, 90*time.Second, true
	goWant.GuestSeccomp = true
	goWant.BindMounts = []BindMount{{Source: "/opt/a"}, {Source: "/opt/b:rw"}}
	rustWant.Way, rustWant.DialTimeout, rustWant.VCPUs = way.Rust, 60*time.Second, 2
	rustWant.NoNetwork = true
	rustWant.BindMounts = []BindMount{{Source: "/opt/a"}, {Source: "/opt/b", Writable: true}, {Source: "/opt/c"}}

	for name, c := range map[string]struct {
		text string
		want Config
	}{
		"go": {`[hypervisor.clh]` + common + `
[agent.kata]
debug_console_enabled = true
dial_timeout = 90
[runtime]
internetworking_model = "tcfilter"
sandbox_bind_mounts = ["/opt/a", "/opt/b:rw"]
`, goWant},
		"rust": {`[hypervisor.clh]` + common + `
default_vcpus = 2.0
[hypervisor.clh.factory]
enable_template = false
[agent.kata]
reconnect_timeout_ms = 60000
[agent.kata.mem_agent]
mem_agent_enable = false
[runtime]
name = "virt_container"
hypervisor_name = "clh"
internetworking_model = "none"
disable_guest_seccomp = true
sandbox_bind_mounts = ["/opt/a", "/opt/b:rw", "/opt/c:ro"]
`, rustWant},
	} {
		got, err := parse([]byte(c.text))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if diff := cmp.Diff(&c.want, got); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
}

func TestAnnotationsOverrideTheFile(t *testing.T) {
	for value, want := range map[string]bool{"": false, "true": false, "false": true} {
		c := &Config{}
		if err := c.Override(map[string]string{"a": "b", seccompAnnotation: value}); err != nil || c.GuestSeccomp != want {
			t.Errorf("%q: profiles are passed: %v (%v)", value, c.GuestSeccomp, err)
		}
	}
	if err := (&Config{}).Override(map[string]string{seccompAnnotation: "maybe"}); err == nil {
		t.Error("maybe is no error")
	}
}

func TestOtherHypervisorsAreRefused(t *testing.T) {
	if _, err := parse([]byte("[hypervisor.qemu]" + common)); err == nil {
		t.Error("a file for QEMU was taken")
	}
	if _, err := parse([]byte("[hypervisor.clh]" + common + "[runtime]\nhypervisor_name = \"qemu\"\n")); err == nil {
		t.Error("a file that names QEMU was taken")
	}
	if _, err := parse([]byte("[hypervisor.clh]\npath = \"/usr/bin/vmm\"\n")); err == nil {
		t.Error("a file without a kernel was taken")
	}
}

func TestDropIns(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"kata.toml":          "[hypervisor.clh]" + common + "[runtime]\nsandbox_bind_mounts = [\"/a\"]\n",
		"config.d/50-a.toml": "[hypervisor.clh]\nguest_hook_path = \"/first\"\nkernel = \"/k\"\n[runtime]\nsandbox_bind_mounts = [\"/b\"]\n",
		"config.d/60-b.toml": "[hypervisor.clh]\nguest_hook_path = \"/second\"\n",
	} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("kata.toml", filepath.Join(dir, "link.toml")); err != nil {
		t.Fatal(err)
	}
	c, err := Load(filepath.Join(dir, "link.toml"))
	if err != nil {
		t.Fatal(err)
	}
	if c.HookPath != "/second" || c.Kernel != "/k" || c.MemoryMiB != 1536 || !cmp.Equal(c.BindMounts, []BindMount{{Source: "/b"}}) {
		t.Errorf("got %+v", c)
	}
}
