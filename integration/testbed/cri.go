// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink"

	"github.com/kata-checkpoint/kata-checkpoint/integration/parts"
)

// Runtime handlers of a CRI testbed, as named by a RuntimeClass.
const (
	// Handler is the runtime under test.
	Handler = "kata-checkpoint"
	// DownstreamHandler is Kata's own runtime, without ours.
	DownstreamHandler = "kata"
)

// CRINamespace is the CRI's containerd namespace.
const CRINamespace = "k8s.io"

// PauseImage is the image of the pods' sandbox containers.
const PauseImage = parts.PauseImageName

// CRI is the part of a testbed that serves pods.
type CRI struct {
	// Number identifies the testbed on the machine; its pods' network is
	// derived from it.
	Number int `json:"number"`
	// NRI is the plugin's process; it runs as a service.
	NRI process `json:"nri"`
}

// criConfig is appended to containerd's configuration.
const criConfig = `
[plugins.'io.containerd.cri.v1.images']
  snapshotter = "overlayfs"
  [plugins.'io.containerd.cri.v1.images'.pinned_images]
    sandbox = %[1]q

[plugins.'io.containerd.cri.v1.runtime']
  netns_mounts_under_state_dir = true
  disable_apparmor = true
  tolerate_missing_hugetlb_controller = true
  enable_experimental_restore_via_create = true
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    %[2]s
    conf_dir = %[3]q
  [plugins.'io.containerd.cri.v1.runtime'.containerd]
    default_runtime_name = %[4]q
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.%[4]s]
    runtime_type = %[5]q
    privileged_without_host_devices = true
    pod_annotations = ['kata-checkpoint.dev/*', 'io.katacontainers.*']
    container_annotations = ['kata-checkpoint.dev/*', 'io.katacontainers.*']
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.%[4]s.options]
      ConfigPath = %[6]q
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.%[7]s]
    runtime_type = "io.containerd.kata.v2"
    runtime_path = %[8]q
    privileged_without_host_devices = true
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.%[7]s.options]
      ConfigPath = %[6]q

[plugins.'io.containerd.nri.v1.nri']
  disable = false
  socket_path = %[9]q
  plugin_path = %[10]q
  plugin_config_path = %[11]q
`

// cniPlugins is the directory of Debian's CNI plugins.
const cniPlugins = "/usr/lib/cni"

// configureCRI writes the files that containerd's CRI needs and returns its
// part of containerd's configuration.
func (t *Testbed) configureCRI(containerd string) (string, error) {
	plugins := fmt.Sprintf("bin_dirs = [%q]", cniPlugins)
	if strings.HasPrefix(containerd, "2.1") {
		plugins = fmt.Sprintf("bin_dir = %q", cniPlugins)
	}
	number, err := claimNumber(t.Dir)
	if err != nil {
		return "", err
	}
	t.CRI = &CRI{Number: number}
	if err := t.record(); err != nil {
		return "", err
	}
	for _, dir := range []string{t.cniConfig(), t.nri("plugins"), t.nri("conf.d"), t.HostPrograms()} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return "", fmt.Errorf("cri: %w", err)
		}
	}
	network, err := json.MarshalIndent(map[string]any{
		"cniVersion": "1.0.0", "name": t.bridge(),
		"plugins": []any{map[string]any{
			"type": "bridge", "bridge": t.bridge(), "isGateway": true,
			"ipam": map[string]any{
				"type": "host-local", "dataDir": filepath.Join(t.Dir, "cni/addresses"),
				"ranges": []any{[]any{map[string]any{"subnet": t.subnet()}}},
				"routes": []any{map[string]any{"dst": "0.0.0.0/0"}},
			},
		}},
	}, "", "  ")
	if err != nil {
		return "", fmt.Errorf("cri: %w", err)
	}
	if err := os.WriteFile(filepath.Join(t.cniConfig(), "10-testbed.conflist"), network, 0o644); err != nil {
		return "", fmt.Errorf("cri: %w", err)
	}
	// containerd's CRI requires a CRIU on the host before it checkpoints
	// anything. The guest bundle's will do.
	if err := os.Symlink(filepath.Join(t.bundle(), "bin/criu"), filepath.Join(t.HostPrograms(), "criu")); err != nil {
		return "", fmt.Errorf("cri: %w", err)
	}
	return fmt.Sprintf(criConfig, PauseImage, plugins, t.cniConfig(), Handler, Runtime, t.KataConfig(), DownstreamHandler, t.Downstream,
		t.NRISocket(), t.nri("plugins"), t.nri("conf.d")), nil
}

// CNIOptions are the options of nerdctl for the network of the testbed's pods,
// and the network's name.
func (t *Testbed) CNIOptions() (options []string, network string) {
	return []string{"--cni-path", cniPlugins, "--cni-netconfpath", t.cniConfig()}, t.bridge()
}

func (t *Testbed) cniConfig() string { return filepath.Join(t.Dir, "cni/net.d") }

func (t *Testbed) nri(name string) string { return filepath.Join(t.Dir, "nri", name) }

// HostPrograms is a directory in containerd's PATH with the links that an
// operator creates.
func (t *Testbed) HostPrograms() string { return filepath.Join(t.Dir, "host-bin") }

// NRISocket is containerd's socket for NRI plugins.
func (t *Testbed) NRISocket() string { return filepath.Join(filepath.Dir(t.Address), "nri.sock") }

// MetricsSocket is where the NRI plugin serves the figures of the shims.
func (t *Testbed) MetricsSocket() string {
	return filepath.Join(filepath.Dir(t.Address), "metrics.sock")
}

// RestoreDir is the directory of archives that pods may be restored from.
func (t *Testbed) RestoreDir() string { return filepath.Join(t.Dir, "checkpoints") }

// The pods of all testbeds on a machine share 203.0.113.0/24, which is reserved
// for documentation: sixteen addresses for each testbed.
const maxNumber = 16

func (t *Testbed) subnet() string { return fmt.Sprintf("203.0.113.%d/28", t.CRI.Number*16) }

func (t *Testbed) bridge() string { return "testbed" + strconv.Itoa(t.CRI.Number) }

// claimNumber reserves the lowest number that no other testbed uses. The file
// is removed with the testbed, or with the last one.
func claimNumber(dir string) (int, error) {
	for n := range maxNumber {
		f, err := os.OpenFile(numberFile(n), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
		if errors.Is(err, fs.ErrExist) {
			// The owner may have been removed by hand.
			owner, readErr := os.ReadFile(numberFile(n))
			if _, statErr := os.Stat(string(owner)); readErr == nil && len(owner) > 0 && errors.Is(statErr, fs.ErrNotExist) {
				f, err = os.OpenFile(numberFile(n), os.O_TRUNC|os.O_WRONLY, 0o644)
			}
		}
		if errors.Is(err, fs.ErrExist) {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("cri: %w", err)
		}
		_, err = f.WriteString(dir)
		return n, errors.Join(err, f.Close())
	}
	return 0, fmt.Errorf("cri: this machine has %d testbeds with pods already", maxNumber)
}

func numberFile(n int) string { return filepath.Join(machineDir, fmt.Sprintf("%d.number", n)) }

// removeCRI removes the pods' network, after all processes of the testbed have
// exited.
func (t *Testbed) removeCRI() error {
	if t.CRI == nil {
		return nil
	}
	var errs []error
	link, err := netlink.LinkByName(t.bridge())
	var none netlink.LinkNotFoundError
	switch {
	case err == nil:
		errs = append(errs, netlink.LinkDel(link))
	case !errors.As(err, &none):
		errs = append(errs, err)
	}
	// libcni caches its results by the network's name.
	results, _ := filepath.Glob("/var/lib/cni/results/" + t.bridge() + "-*")
	for _, path := range results {
		errs = append(errs, os.Remove(path))
	}
	for _, dir := range []string{"/var/lib/cni/results", "/var/lib/cni"} {
		_ = os.Remove(dir) // not empty, or not there
	}
	errs = append(errs, os.RemoveAll(numberFile(t.CRI.Number)))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove the pods' network: %w", err)
	}
	return nil
}

// StartNRI starts the NRI plugin as a service and returns once containerd has
// accepted it.
func (t *Testbed) StartNRI(ctx context.Context) error {
	path := filepath.Join(t.logDir(), "nri")
	out, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return fmt.Errorf("nri: %w", err)
	}
	defer out.Close()
	before, err := out.Stat()
	if err != nil {
		return fmt.Errorf("nri: %w", err)
	}
	p, err := parts.Find()
	if err != nil {
		return err
	}
	cmd := exec.Command(p.Bin("kata-checkpoint-nri"), "--config", t.OwnConfig(), "--idx", "90", "--name", "kata-checkpoint", "--socket", t.NRISocket())
	cmd.Dir, cmd.Stdout, cmd.Stderr = t.Dir, out, out
	cmd.Env = append(os.Environ(), ownerEnv+"="+t.Dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start the NRI plugin (make build): %w", err)
	}
	go cmd.Wait() //nolint:errcheck // reaped if this process lives on
	if t.CRI.NRI, err = processOf(cmd.Process.Pid); err != nil {
		return fmt.Errorf("start the NRI plugin: %w", err)
	}
	if err := t.record(); err != nil {
		return err
	}
	if !eventually(ctx, hang, func() bool {
		data, err := os.ReadFile(path)
		return err == nil && strings.Contains(string(data[before.Size():]), nriReady) || !t.CRI.NRI.alive()
	}) || !t.CRI.NRI.alive() {
		return fmt.Errorf("containerd did not accept the NRI plugin: %s", lastLines(path))
	}
	return nil
}

// nriReady is what the plugin logs once containerd has accepted it.
const nriReady = "registered with NRI"

// KillNRI kills the NRI plugin with SIGKILL, as a crash would.
func (t *Testbed) KillNRI(ctx context.Context) error {
	t.CRI.NRI.signal(syscall.SIGKILL)
	if !waitGone(ctx, hang, t.CRI.NRI) {
		return fmt.Errorf("the NRI plugin (pid %d) did not exit", t.CRI.NRI.PID)
	}
	return nil
}
