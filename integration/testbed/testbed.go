// SPDX-License-Identifier: Apache-2.0

// Package testbed runs a containerd with Kata in one directory, with VMs that
// need no KVM. The scenarios, the benchmarks and the command testbed call it.
//
// [Up] starts a testbed, [Open] finds a running one, [Testbed.Down] removes it
// with everything that ran in it and nothing else. Several testbeds can run on
// a machine at the same time; what they share (mount propagation, a syslog
// socket) is restored when the last one ends. Root is required. The programs
// come from package parts, `make build` and `make guest-bundle`.
//
// Kata is either this project's stand-in or, with [Options].Kata, a real one: a
// directory with Kata's containerd-shim-kata-v2, configuration.toml and
// kata-agent.
package testbed

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/log"

	"github.com/kata-checkpoint/kata-checkpoint/integration/parts"
	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/vmm"
)

// Namespace is the containerd namespace of [Testbed.Client].
const Namespace = "default"

// Runtime is the runtime under test.
const Runtime = "io.containerd.kata-checkpoint.v2"

// Image is imported into every testbed: busybox, with a user of id 1000.
const Image = parts.ImageName

// Way is which of Kata's two shims is used: they differ in the layout of the
// share, the names of sockets and the use of guest hooks.
type Way string

// The ways of Kata's Go and Rust shims.
const (
	Go   Way = "go"
	Rust Way = "rust"
)

// Values of [Options].GuestMounts.
const (
	Shared  = "shared"
	Private = "private"
)

// Options describes a testbed. Only Dir is required.
type Options struct {
	Dir         string // created by Up, removed by Down
	Kata        string // directory of a real Kata; empty: the stand-in
	Way         Way    // of the stand-in; a real Kata's follows from its configuration
	GuestMounts string // propagation of the guest's mounts before the agent starts; default [Shared], as under systemd
	Accel       string // vmm.AccelKVM or vmm.AccelTCG; empty: KVM if it boots a guest
	// NoNetwork keeps Kata from creating a network namespace and from waiting
	// for network interfaces. Without CNI there are none, and Kata's Rust shim
	// waits 5 s for one at every start of a sandbox.
	NoNetwork bool
	NoAgent   bool // do not configure the guest bundle in Kata, and have the shim do without
	// Bare leaves out all that `kata-checkpoint install` puts on a node: the
	// shim is not on containerd's PATH, and neither containerd nor Kata is
	// configured for it. containerd imports the files of [Testbed.ConfD].
	Bare        bool
	GuestBundle string // default: build/guest-bundle
	Containerd  string // its release, such as "2.1"; default parts.ContainerdVersion
	CRI         bool   // also serve the CRI, with CNI and the NRI plugin
	// Settings override keys in the configuration of the shim under test.
	Settings map[string]any
}

// Testbed is a running testbed. Only containerd's process changes, when it is
// restarted.
type Testbed struct {
	Dir     string `json:"dir"`
	Kata    string `json:"kata,omitempty"`
	Way     Way    `json:"way"`
	Address string `json:"address"` // containerd's socket
	Path    string `json:"path"`    // PATH with the programs under test and ctr
	// Downstream is the path of Kata's shim, which can be used as a runtime
	// with [Testbed.KataConfig].
	Downstream string `json:"downstream"`

	Containerd process `json:"containerd"`
	CRI        *CRI    `json:"cri,omitempty"`        // nil without the CRI
	SocketDir  string  `json:"socket_dir,omitempty"` // outside of Dir if Dir is too long for a socket's path

	containerd string // the program; only known after Up
}

const recordName = "testbed.json"

// Up starts a testbed and returns once its containerd serves and has the image.
// If it fails, it leaves nothing behind.
func Up(ctx context.Context, o Options) (_ *Testbed, err error) {
	start := time.Now()
	p, err := parts.Find()
	if err != nil {
		return nil, err
	}
	if err := o.complete(p); err != nil {
		return nil, err
	}
	if err := claim(ctx, o.Dir); err != nil {
		return nil, err
	}
	t := &Testbed{Dir: o.Dir, Kata: o.Kata, Way: o.Way}
	// From here on there is something to remove, also by a later `testbed
	// down`.
	if err := t.record(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.Down(context.WithoutCancel(ctx)))
		}
	}()
	for _, d := range []string{"bin", "run", "root", "log", "state", "stop", "tmp"} {
		if err := os.MkdirAll(filepath.Join(t.Dir, d), 0o711); err != nil {
			return nil, fmt.Errorf("testbed: %w", err)
		}
	}
	if err := joinMachine(t.Dir); err != nil {
		return nil, err
	}
	if err := t.chooseSockets(); err != nil {
		return nil, err
	}
	if err := t.configure(ctx, p, o); err != nil {
		return nil, err
	}
	if err := t.configureContainerd(ctx, p, o); err != nil {
		return nil, err
	}
	if err := t.StartContainerd(ctx); err != nil {
		return nil, err
	}
	images := []func(context.Context) (string, error){p.Image}
	if t.CRI != nil {
		if err := t.StartNRI(ctx); err != nil {
			return nil, err
		}
		images = append(images, p.PauseImage)
	}
	for _, part := range images {
		image, err := part(ctx)
		if err != nil {
			return nil, err
		}
		if err := t.Import(ctx, image); err != nil {
			return nil, err
		}
	}
	if err := os.WriteFile(filepath.Join(t.Dir, "env"), []byte(t.Env()), 0o644); err != nil {
		return nil, fmt.Errorf("testbed: %w", err)
	}
	log.G(ctx).WithFields(log.Fields{"dir": t.Dir, "way": t.Way, "took": time.Since(start)}).Info("testbed is up")
	return t, nil
}

// complete checks the options and fills in defaults.
func (o *Options) complete(p *parts.Parts) error {
	var err error
	if o.Dir == "" {
		return errors.New("testbed: no directory given")
	}
	if o.Dir, err = filepath.Abs(o.Dir); err != nil {
		return fmt.Errorf("testbed: %w", err)
	}
	if o.Kata != "" {
		if o.Kata, err = filepath.Abs(o.Kata); err != nil {
			return fmt.Errorf("testbed: %w", err)
		}
		if o.Way, err = WayOfKata(o.Kata); err != nil {
			return err
		}
	}
	if o.Way == "" {
		o.Way = Go
	}
	if o.Way != Go && o.Way != Rust {
		return fmt.Errorf("testbed: unknown way %q", o.Way)
	}
	if o.GuestMounts == "" {
		o.GuestMounts = Shared
	}
	if o.GuestMounts != Shared && o.GuestMounts != Private {
		return fmt.Errorf("testbed: guest mounts cannot be %q", o.GuestMounts)
	}
	switch o.Accel {
	case "", vmm.AccelKVM, vmm.AccelTCG:
	default:
		return fmt.Errorf("testbed: unknown accelerator %q", o.Accel)
	}
	if o.Containerd == "" {
		o.Containerd = parts.ContainerdVersion
	}
	if o.Containerd != parts.ContainerdVersion && !slices.Contains(parts.OlderContainerds, o.Containerd) {
		return fmt.Errorf("testbed: unknown release %q of containerd", o.Containerd)
	}
	if o.GuestBundle == "" {
		o.GuestBundle = p.Build("guest-bundle")
	}
	return nil
}

// WayOfKata returns which of Kata's shims is in a directory.
func WayOfKata(dir string) (Way, error) {
	configuration, err := os.ReadFile(filepath.Join(dir, "configuration.toml"))
	if err != nil {
		return "", fmt.Errorf("testbed: %w", err)
	}
	return wayOf(string(configuration)), nil
}

// claim creates the directory. If it contains the record of a dead testbed,
// that testbed is removed first; any other content is an error.
func claim(ctx context.Context, dir string) error {
	old, err := Open(dir)
	switch {
	case err == nil && old.Containerd.alive():
		return fmt.Errorf("testbed: %s is up", dir)
	case err == nil:
		if err := old.Down(ctx); err != nil {
			return err
		}
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("testbed: %w", err)
	}
	if len(entries) > 0 {
		return fmt.Errorf("testbed: %s is not empty and not a testbed", dir)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("testbed: %w", err)
	}
	return nil
}

// Open finds the testbed in dir. The error is fs.ErrNotExist if there is none.
func Open(dir string) (*Testbed, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("testbed: %w", err)
	}
	data, err := os.ReadFile(filepath.Join(dir, recordName))
	if err != nil {
		return nil, fmt.Errorf("no testbed in %s: %w", dir, err)
	}
	t := &Testbed{}
	if err := json.Unmarshal(data, t); err != nil {
		return nil, fmt.Errorf("testbed in %s: %w", dir, err)
	}
	if t.Dir != dir {
		return nil, fmt.Errorf("the testbed in %s was created as %s", dir, t.Dir)
	}
	return t, nil
}

func (t *Testbed) record() error {
	data, err := json.MarshalIndent(t, "", "  ")
	if err != nil {
		return fmt.Errorf("testbed: %w", err)
	}
	if err := os.WriteFile(filepath.Join(t.Dir, recordName), append(data, '\n'), 0o644); err != nil {
		return fmt.Errorf("testbed: %w", err)
	}
	return nil
}

// Client connects to the testbed's containerd. The caller closes the client.
func (t *Testbed) Client() (*client.Client, error) {
	c, err := client.New(t.Address, client.WithDefaultNamespace(Namespace))
	if err != nil {
		return nil, fmt.Errorf("connect to containerd: %w", err)
	}
	return c, nil
}

// Env returns shell code that exports what is needed to work with the testbed.
func (t *Testbed) Env() string {
	env := fmt.Sprintf("export CONTAINERD_ADDRESS=%s\nexport CONTAINERD_NAMESPACE=%s\nexport RUNTIME=%s\nexport TESTBED_DIR=%s\nexport PATH=%s\n",
		quote(t.Address), Namespace, Runtime, quote(t.Dir), quote(t.Path))
	if t.CRI != nil {
		// crictl's.
		env += fmt.Sprintf("export CONTAINER_RUNTIME_ENDPOINT=%[1]s\nexport IMAGE_SERVICE_ENDPOINT=%[1]s\nexport RUNTIME_HANDLER=%[2]s\n", quote("unix://"+t.Address), Handler)
	}
	return env
}

// KataConfig is the path of Kata's configuration for this testbed.
func (t *Testbed) KataConfig() string { return filepath.Join(t.Dir, "kata.toml") }

// ContainerdLog is the path of the log of containerd and the shims.
func (t *Testbed) ContainerdLog() string { return filepath.Join(t.logDir(), "containerd") }

// ConsoleLog is the path of the guest's console log: the kernel's and the
// agent's messages.
func (t *Testbed) ConsoleLog(sandbox string) string {
	return filepath.Join(t.logDir(), sandbox+".console")
}

// HybridSocket is the hybrid vsock socket of a sandbox.
func (t *Testbed) HybridSocket(sandbox string) string {
	if t.Way == Rust {
		return filepath.Join("/run/kata", sandbox, "ch-vm.sock")
	}
	return filepath.Join("/run/vc/vm", sandbox, "clh.sock")
}

func (t *Testbed) logDir() string { return filepath.Join(t.Dir, "log") }
