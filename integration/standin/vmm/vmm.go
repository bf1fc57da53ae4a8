// SPDX-License-Identifier: Apache-2.0

// Package vmm implements the part of Cloud Hypervisor's HTTP API that Kata's Go
// and Rust shims use, with QEMU.
//
// The tests need VMs on machines without KVM, on which Cloud Hypervisor cannot
// run: QEMU has TCG. The program testbed-vmm is the only caller; Kata starts it
// as its hypervisor. Written for Kata 4.1.0.
//
// The order of calls is Cloud Hypervisor's: [Server.Serve] first, then, over
// the socket, vm.create, vm.add-net (any number), vm.boot. vm.add-net after
// vm.boot plugs the card into the running machine. When the guest powers off,
// on vmm.shutdown, or when the context given to Serve ends, Serve kills what it
// started and returns. No child outlives the process, even if that is killed
// with SIGKILL, because every child has a parent death signal.
package vmm

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// Version is what --version prints: Kata parses it and rejects releases that it
// considers too old.
const Version = "cloud-hypervisor v50.0"

// Values of [Settings].Accel.
const (
	AccelKVM = "kvm"
	AccelTCG = "tcg"
)

// ConfigEnv is the environment variable with the settings file's path. By
// default the file is next to the program, with ".json" appended to the
// program's name: Kata's arguments cannot name it.
const ConfigEnv = "TESTBED_VMM_CONFIG"

// Settings are what Cloud Hypervisor's API does not provide.
type Settings struct {
	QEMU             string   `json:"qemu"`
	VhostDeviceVsock string   `json:"vhost_device_vsock"`
	Accel            string   `json:"accel"`
	LogDir           string   `json:"log_dir"`
	ReadySigns       []string `json:"ready_signs"` // the agent listens once the guest's console has a line that contains one of these
	KernelParams     string   `json:"kernel_params,omitempty"`
	Env              []string `json:"env,omitempty"` // added to the children's environment, so that a cleanup finds them
}

// DefaultReadySign is printed by Kata's agent once its ttrpc server listens,
// and therefore once the guest's vsock driver works.
const DefaultReadySign = "ttRPC server started"

// LoadSettings reads the settings file that the environment names, or else the
// one next to the program at exe.
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
