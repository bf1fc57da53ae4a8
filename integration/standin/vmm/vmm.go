// Package vmm answers the part of Cloud Hypervisor's HTTP API that Kata's Go
// and Rust shims use, and runs a QEMU for it.
//
// It exists because the tests need a VM where Cloud Hypervisor, which knows
// nothing but KVM, cannot run: QEMU falls back to TCG. The program testbed-vmm
// is its only caller; Kata starts that as its hypervisor and never notices.
//
// The order of calls is Cloud Hypervisor's: [Server.Serve] first, then over the
// socket vm.create, vm.add-net (any number), vm.boot. vm.add-net after vm.boot
// plugs the card into the running machine. When the guest powers off, when
// vmm.shutdown comes, or when the context given to Serve ends, Serve kills what
// it started and returns; nothing of it outlives the process, not even one
// killed with SIGKILL, because every child asks the kernel for a SIGKILL of its
// own at the parent's death.
package vmm

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// Version is what --version prints: Kata parses it and refuses releases that it
// considers too old.
const Version = "cloud-hypervisor v50.0"

// Accelerators that [Settings].Accel takes.
const (
	AccelKVM = "kvm"
	AccelTCG = "tcg"
)

// ConfigEnv names the environment variable with the settings file's path.
// Without it the file lies beside the program, with the program's name and
// ".json" appended: Kata starts its hypervisor with arguments of its own only.
const ConfigEnv = "TESTBED_VMM_CONFIG"

// Settings is everything that Cloud Hypervisor's API does not tell.
type Settings struct {
	QEMU             string   `json:"qemu"`
	VhostDeviceVsock string   `json:"vhost_device_vsock"`
	Accel            string   `json:"accel"`
	LogDir           string   `json:"log_dir"`
	ReadySigns       []string `json:"ready_signs"` // a line on the guest's console that contains one of these says that the agent listens
	KernelParams     string   `json:"kernel_params,omitempty"`
	Env              []string `json:"env,omitempty"` // added to the children's environment, so that a cleaner finds them
}

// DefaultReadySign is printed by Kata's agent once its ttRPC server listens,
// and so once the guest's vsock driver works.
const DefaultReadySign = "ttRPC server started"

// LoadSettings reads the settings file: the one that the environment names,
// else the one beside the program at exe.
func LoadSettings(exe string) (Settings, error) {
	path := os.Getenv(ConfigEnv)
	if beside := exe + ".json"; path == "" {
		path = beside
	}
	var s Settings
	data, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return s, fmt.Errorf("read settings: %w", err)
	}
	if err == nil {
		if err := json.Unmarshal(data, &s); err != nil {
			return s, fmt.Errorf("parse settings %s: %w", path, err)
		}
	}
	return s.withDefaults()
}

func (s Settings) withDefaults() (Settings, error) {
	if s.QEMU == "" {
		s.QEMU = "qemu-system-x86_64"
	}
	if s.VhostDeviceVsock == "" {
		s.VhostDeviceVsock = "vhost-device-vsock"
	}
	if s.Accel == "" {
		s.Accel = AccelTCG
	}
	if s.Accel != AccelTCG && s.Accel != AccelKVM {
		return s, fmt.Errorf("unknown accelerator %q", s.Accel)
	}
	if s.LogDir == "" {
		s.LogDir = filepath.Join(os.TempDir(), "testbed-vmm")
	}
	if len(s.ReadySigns) == 0 {
		s.ReadySigns = []string{DefaultReadySign}
	}
	return s, nil
}
