// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/pelletier/go-toml/v2"

	"github.com/kata-checkpoint/kata-checkpoint/integration/parts"
	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/vmm"
)

// ownerEnv marks the environment of every process of a testbed. Env does not
// export it, because a user's shell must not be killed.
const ownerEnv = "TESTBED_OWNER"

// configure writes the configuration of all programs.
func (t *Testbed) configure(ctx context.Context, p *parts.Parts, o Options) error {
	template, downstream := standinGo, p.Bin("standin", string(o.Way), "containerd-shim-kata-v2")
	if o.Way == Rust {
		template = standinRust
	}
	if o.Kata != "" {
		downstream = filepath.Join(o.Kata, "containerd-shim-kata-v2")
		data, err := os.ReadFile(filepath.Join(o.Kata, "configuration.toml"))
		if err != nil {
			return fmt.Errorf("configure: %w", err)
		}
		template = string(data)
	}
	t.Downstream = downstream
	var initrd string
	var err error
	if o.Kata != "" {
		initrd, err = p.KataInitrd(ctx, filepath.Join(o.Kata, "kata-agent"))
	} else {
		initrd, err = p.StandinInitrd(ctx, p.Bin("standin-agent"))
	}
	if err != nil {
		return err
	}
	kernel, _, err := parts.Kernel()
	if err != nil {
		return fmt.Errorf("configure: %w", err)
	}
	if o.Accel == "" {
		o.Accel = vmm.AccelTCG
		works, err := p.KVMWorks(ctx, initrd)
		if err != nil {
			return err
		}
		if works {
			o.Accel = vmm.AccelKVM
		}
	}
	if err := t.installVMM(ctx, p, o.Accel); err != nil {
		return err
	}
	settings := kataSettings{
		VMM: filepath.Join(t.Dir, "bin/testbed-vmm"), Virtiofsd: filepath.Join(t.Dir, "bin/testbed-virtiofsd"),
		Kernel: kernel, Initrd: initrd, GuestMounts: o.GuestMounts, Way: o.Way, NoNetwork: o.NoNetwork,
	}
	if !o.NoAgent && !o.Bare {
		settings.GuestBundle = t.bundle()
		if err := os.CopyFS(settings.GuestBundle, os.DirFS(o.GuestBundle)); err != nil {
			return fmt.Errorf("guest bundle (make guest-bundle): %w", err)
		}
	}
	kata, err := deriveKataConfig(template, settings)
	if err != nil {
		return err
	}
	ours, err := toml.Marshal(ownSettings(t, o, downstream))
	if err != nil {
		return fmt.Errorf("configure: %w", err)
	}
	return errors.Join(
		os.WriteFile(t.KataConfig(), []byte(kata), 0o644),
		os.WriteFile(t.OwnConfig(), ours, 0o644),
	)
}

// ownSettings is the configuration of the shim under test.
func ownSettings(t *Testbed, o Options, downstream string) map[string]any {
	settings := map[string]any{
		"downstream_shim":  downstream,
		"kata_config_path": t.KataConfig(),
		"state_dir":        filepath.Join(t.Dir, "state"),
		"guest_bundle":     t.bundle(),
		"agent_timeout":    "60s", // a guest under TCG
		"metrics_dir":      filepath.Join(t.Dir, "metrics"),
	}
	if o.NoAgent {
		settings["guest_agent"] = "optional"
	}
	if o.CRI {
		settings["restore_dir"] = t.RestoreDir()
		settings["metrics_address"] = "unix:" + t.MetricsSocket()
	}
	maps.Copy(settings, o.Settings)
	return settings
}

func (t *Testbed) bundle() string { return filepath.Join(t.Dir, "bundle") }

// StopDir is where shims look for the phases at which a test stops them.
func (t *Testbed) StopDir() string { return filepath.Join(t.Dir, "stop") }

// OwnConfig is the configuration of the shim and the NRI plugin.
func (t *Testbed) OwnConfig() string { return filepath.Join(t.Dir, "kata-checkpoint.toml") }

// installVMM copies the programs that Kata starts into the testbed's directory,
// so that their paths tell which testbed they belong to and the VMM finds its
// settings next to itself, whatever environment Kata gives it.
func (t *Testbed) installVMM(ctx context.Context, p *parts.Parts, accel string) error {
	vsock, err := p.VhostDeviceVsock(ctx)
	if err != nil {
		return err
	}
	for _, name := range []string{"testbed-vmm", "testbed-virtiofsd"} {
		if err := parts.CopyFile(p.Bin(name), filepath.Join(t.Dir, "bin", name)); err != nil {
			return fmt.Errorf("install %s (make build): %w", name, err)
		}
	}
	settings, err := json.MarshalIndent(vmm.Settings{
		QEMU: "qemu-system-x86_64", VhostDeviceVsock: vsock, Accel: accel, LogDir: t.logDir(),
		ReadySigns: []string{vmm.DefaultReadySign}, Env: []string{ownerEnv + "=" + t.Dir},
	}, "", "  ")
	if err != nil {
		return fmt.Errorf("vmm settings: %w", err)
	}
	if err := os.WriteFile(filepath.Join(t.Dir, "bin/testbed-vmm.json"), settings, 0o644); err != nil {
		return fmt.Errorf("vmm settings: %w", err)
	}
	return nil
}

// maxSocketDir is the maximum length of a directory for containerd's sockets:
// the kernel limits their paths to 107 bytes.
const maxSocketDir = 107 - len("/containerd.sock.ttrpc")

const containerdConfig = `version = 3
imports = [%[6]s]
root = %[1]q
state = %[2]q
disabled_plugins = [%[5]s]

[grpc]
address = %[3]q

[ttrpc]
address = %[4]q

[debug]
level = "debug"

# A busy machine may need longer than containerd's 3 s to end a VM.
[timeouts]
"io.containerd.timeout.shim.shutdown" = "1m"
`

// criPlugins are disabled in a containerd without the CRI.
const criPlugins = `"io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime", "io.containerd.cri.v1.images", "io.containerd.nri.v1.nri"`

// chooseSockets chooses where containerd's socket and those beside it are.
func (t *Testbed) chooseSockets() (err error) {
	sockets := filepath.Join(t.Dir, "run")
	if len(sockets) > maxSocketDir {
		if t.SocketDir, err = os.MkdirTemp("/run", "testbed-"); err != nil {
			return fmt.Errorf("containerd: %w", err)
		}
		sockets = t.SocketDir
	}
	t.Address = filepath.Join(sockets, "containerd.sock")
	return nil
}

// configureContainerd writes containerd's configuration: where its programs,
// files and sockets are.
func (t *Testbed) configureContainerd(ctx context.Context, p *parts.Parts, o Options) error {
	programs, err := p.Containerd(ctx, o.Containerd)
	if err != nil {
		return err
	}
	t.Path = strings.Join([]string{p.Bin(), programs, os.Getenv("PATH")}, ":")
	t.containerd = filepath.Join(programs, "containerd")
	disabled, cri, imports := criPlugins, "", ""
	if o.CRI {
		crictl, err := p.Crictl(ctx)
		if err != nil {
			return err
		}
		t.Path = strings.Join([]string{t.HostPrograms(), filepath.Dir(crictl), t.Path}, ":")
		disabled = ""
		if cri, err = t.configureCRI(o.Containerd); err != nil {
			return err
		}
	}
	if o.Bare {
		t.Path = strings.Join([]string{t.HostPrograms(), programs, os.Getenv("PATH")}, ":")
		imports = strconv.Quote(t.ConfD() + "/*.toml")
	}
	text := fmt.Sprintf(containerdConfig, filepath.Join(t.Dir, "root"), filepath.Join(t.Dir, "run"), t.Address, t.Address+".ttrpc", disabled, imports) + cri
	if err := os.WriteFile(t.ContainerdConfig(), []byte(text), 0o644); err != nil {
		return fmt.Errorf("containerd: %w", err)
	}
	return nil
}

// ContainerdConfig is the path of containerd's configuration.
func (t *Testbed) ContainerdConfig() string { return filepath.Join(t.Dir, "containerd.toml") }

// ConfD is the directory of containerd's drop-ins, in a bare testbed.
func (t *Testbed) ConfD() string { return filepath.Join(t.Dir, "conf.d") }

// KillContainerd kills containerd with SIGKILL, as a crash would.
func (t *Testbed) KillContainerd(ctx context.Context) error {
	t.Containerd.signal(syscall.SIGKILL)
	if !waitGone(ctx, hang, t.Containerd) {
		return fmt.Errorf("containerd (pid %d) did not exit", t.Containerd.PID)
	}
	return nil
}

// StartContainerd starts or restarts containerd as a daemon and returns when it
// serves. By then it has loaded the tasks of the previous one.
// env is added to its environment.
func (t *Testbed) StartContainerd(ctx context.Context, env ...string) error {
	out, err := os.OpenFile(filepath.Join(t.logDir(), "containerd"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return fmt.Errorf("containerd: %w", err)
	}
	defer out.Close()
	cmd := exec.Command(t.containerd, "--config", t.ContainerdConfig()) // no context: it outlives this process
	cmd.Dir, cmd.Stdout, cmd.Stderr = t.Dir, out, out
	// containerd unpacks checkpoints into its temporary directory, by default
	// /tmp.
	cmd.Env = append(os.Environ(), "PATH="+t.Path, "KATA_CHECKPOINT_CONFIG="+t.OwnConfig(), ownerEnv+"="+t.Dir,
		"KATA_CHECKPOINT_STOP_DIR="+t.StopDir(), "TMPDIR="+filepath.Join(t.Dir, "tmp"), "XDG_RUNTIME_DIR=")
	cmd.Env = append(cmd.Env, env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start containerd: %w", err)
	}
	// Reaped, so that it is no zombie if a test takes its testbed down in the
	// same process.
	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(ended)
	}()
	if t.Containerd, err = processOf(cmd.Process.Pid); err != nil {
		return fmt.Errorf("start containerd: %w", err)
	}
	if err := t.record(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, hang)
	defer cancel()
	for {
		err := t.serves(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ended:
			return fmt.Errorf("containerd exited: %s", lastLines(filepath.Join(t.logDir(), "containerd")))
		case <-ctx.Done():
			return fmt.Errorf("containerd does not serve: %w", err)
		}
	}
}

func (t *Testbed) serves(ctx context.Context) error {
	if _, err := os.Stat(t.Address); err != nil {
		return err
	}
	c, err := t.Client()
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.Version(ctx)
	return err
}

// Import imports the images of an archive into containerd, and into the CRI's
// namespace if the CRI is served, and unpacks them.
func (t *Testbed) Import(ctx context.Context, archive string) error {
	if t.CRI != nil {
		if err := t.importTo(namespaces.WithNamespace(ctx, CRINamespace), archive); err != nil {
			return err
		}
	}
	return t.importTo(ctx, archive)
}

func (t *Testbed) importTo(ctx context.Context, archive string) error {
	f, err := os.Open(archive)
	if err != nil {
		return fmt.Errorf("import image: %w", err)
	}
	defer f.Close()
	c, err := t.Client()
	if err != nil {
		return err
	}
	defer c.Close()
	images, err := c.Import(ctx, f)
	if err != nil {
		return fmt.Errorf("import image: %w", err)
	}
	for _, image := range images {
		if err := client.NewImage(c, image).Unpack(ctx, ""); err != nil {
			return fmt.Errorf("unpack image: %w", err)
		}
	}
	return nil
}

// lastLines returns the end of a log, for an error.
func lastLines(path string) string {
	data, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	const keep = 1000
	return strings.TrimSpace(string(data[max(0, len(data)-keep):]))
}
