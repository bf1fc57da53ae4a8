// SPDX-License-Identifier: Apache-2.0

package vmm

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestArguments(t *testing.T) {
	tcg, kvm := Settings{Accel: AccelTCG}, Settings{Accel: AccelKVM, KernelParams: "testbed.mounts=private"}
	for _, tc := range []struct {
		name     string
		body     string
		settings Settings
		nics     []nic
		vsockFD  int
		want     []string
		not      []string
	}{{
		name:     "a guest of its own under TCG",
		body:     `{"payload":{"kernel":"/boot/k","cmdline":"agent.log=debug","initramfs":"/i"},"cpus":{"boot_vcpus":2},"memory":{"size":1610612736}}`,
		settings: tcg,
		want:     []string{"-accel tcg,", "-cpu max", "-smp 2", "-m 1536M", "share=on,size=1536M", "-kernel /boot/k", "-initrd /i", "agent.log=debug console=ttyS0 reboot=t no_timer_check"},
		not:      []string{"vhost-user", "-netdev", "-drive"},
	}, {
		name:     "under KVM the timer check stays, and our parameters come last",
		body:     `{"payload":{"kernel":"/boot/k","cmdline":"a=b"}}`,
		settings: kvm,
		want:     []string{"-accel kvm", "-cpu host", "-smp 1", "-m 1024M", "a=b console=ttyS0 reboot=t testbed.mounts=private"},
		not:      []string{"no_timer_check", "-initrd"},
	}, {
		name:     "file system, vsock and disk",
		body:     `{"payload":{},"fs":[{"tag":"kataShared","socket":"/run/a,b/fs.sock"}],"vsock":{"cid":3,"socket":"/x"},"disks":[{"path":"/d.img","readonly":true}]}`,
		settings: tcg, vsockFD: 5,
		want: []string{"socket,id=fs0,path=/run/a,,b/fs.sock", "vhost-user-fs-pci,chardev=fs0,tag=kataShared", "socket,id=vsock,fd=5", "vhost-user-vsock-pci,chardev=vsock",
			"file=/d.img,if=none,id=disk0,format=raw,readonly=on"},
	}, {
		name:     "a card with one queue and one with two",
		body:     `{"payload":{}}`,
		settings: tcg,
		nics:     []nic{{netConfig{MAC: "02:00:00:00:00:01"}, []int{6}}, {netConfig{}, []int{7, 8}}},
		want: []string{"-netdev tap,id=net0,fd=6", "virtio-net-pci,netdev=net0,romfile=,mac=02:00:00:00:00:01", "-netdev tap,id=net1,fds=7:8",
			"virtio-net-pci,netdev=net1,romfile=,mq=on,vectors=6"},
	}} {
		t.Run(tc.name, func(t *testing.T) {
			var c vmConfig
			if err := json.Unmarshal([]byte(tc.body), &c); err != nil {
				t.Fatal(err)
			}
			got := strings.Join(arguments(c, tc.settings, "sandbox", tc.nics, tc.vsockFD), " ")
			for _, want := range tc.want {
				if !strings.Contains(got, want) {
					t.Errorf("no %q in\n%s", want, got)
				}
			}
			for _, not := range tc.not {
				if strings.Contains(got, not) {
					t.Errorf("%q in\n%s", not, got)
				}
			}
		})
	}
}

func TestLoadSettings(t *testing.T) {
	dir := t.TempDir()
	exe := filepath.Join(dir, "testbed-vmm")
	write := func(path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv(ConfigEnv, "")
	if s, err := LoadSettings(exe); err != nil || s.Accel != AccelTCG || s.ReadySigns[0] != DefaultReadySign {
		t.Errorf("without a file: %+v, %v", s, err)
	}
	write(exe+".json", `{"accel":"kvm","ready_signs":["here I am"]}`)
	if s, err := LoadSettings(exe); err != nil || s.Accel != AccelKVM || s.ReadySigns[0] != "here I am" {
		t.Errorf("beside the program: %+v, %v", s, err)
	}
	other := filepath.Join(dir, "other")
	write(other, `{"accel":"hax"}`)
	t.Setenv(ConfigEnv, other)
	if _, err := LoadSettings(exe); err == nil {
		t.Error("an unknown accelerator is taken")
	}
}

func TestConsoleSeesASignAcrossWrites(t *testing.T) {
	for _, tc := range []struct {
		name   string
		writes []string
		ready  bool
	}{
		{"in one piece", []string{"x agent is up y"}, true},
		{"cut in two", []string{"boot\nagent is", " up\n"}, true},
		{"byte by byte", strings.Split("..agent is up", ""), true},
		{"never", []string{"agent is", " down"}, false},
		{"the other sign", []string{"ttRPC ser", "ver started"}, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var log strings.Builder
			c := newConsole(&log, []string{"agent is up", DefaultReadySign})
			for _, w := range tc.writes {
				if n, err := c.Write([]byte(w)); n != len(w) || err != nil {
					t.Fatalf("write: %d, %v", n, err)
				}
			}
			ready := false
			select {
			case <-c.ready:
				ready = true
			default:
			}
			if ready != tc.ready {
				t.Errorf("ready: %v, want %v", ready, tc.ready)
			}
			if want := strings.Join(tc.writes, ""); log.String() != want {
				t.Errorf("log %q, want %q", log.String(), want)
			}
		})
	}
}
