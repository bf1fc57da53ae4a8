// Package testbed runs a containerd with Kata below it, in VMs that need no KVM, everything in one directory. The scenarios, the
// benchmarks and the command testbed call it.
//
// [Up] makes one, [Open] finds one that runs, [Testbed.Down] takes it away, with all that ran in it and nothing else: several testbeds
// can run on a machine at the same time, and what they share (the propagation of mounts, a syslog socket) is put back when the last one
// goes. All of it needs root. The programs come from package parts, and from `make build` and `make guest-bundle`.
//
// Kata is either the stand-in of this project or, with [Options].Kata, a real one: a directory with Kata's containerd-shim-kata-v2,
// configuration.toml and kata-agent.
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

// Namespace is containerd's namespace that [Testbed.Client] works in.
const Namespace = "default"

// Runtime is the runtime under test.
const Runtime = "io.containerd.kata-checkpoint.v2"

// Image is in every testbed's containerd: busybox, with a user of id 1000.
const Image = parts.ImageName

// Way is one of the two ways in which Kata's shims lay out the share, name their sockets and run guest hooks.
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

// Options says what testbed to make. Only Dir is needed.
type Options struct {
	Dir         string // is made, and removed by Down
	Kata        string // directory of a real Kata; empty: the stand-in
	Way         Way    // of the stand-in; a real Kata's is found in its configuration
	GuestMounts string // propagation of the guest's mounts before the agent starts; default [Shared], as under systemd
	Accel       string // vmm.AccelKVM or vmm.AccelTCG; empty: KVM where it has booted a guest
	// NoNetwork keeps Kata from making a network namespace and from looking for network cards. Without CNI there are none, and Kata's Rust
	// shim waits 5 s for one at every start of a sandbox.
	NoNetwork   bool
	NoAgent     bool   // leave our guest bundle out of Kata's configuration, and have the shim do without
	GuestBundle string // default: build/guest-bundle
	Containerd  string // its release, such as "2.1"; default parts.ContainerdVersion
	CRI         bool   // serve the CRI, too, with CNI and the NRI plugin: pods in Kata
	// Settings are keys of the configuration of the shim under test, over those that the testbed gives it.
	Settings map[string]any
}

// Testbed is a running one. Only what names the process of containerd changes, when that is started again.
type Testbed struct {
	Dir     string `json:"dir"`
	Kata    string `json:"kata,omitempty"`
	Way     Way    `json:"way"`
	Address string `json:"address"` // containerd's socket
	Path    string `json:"path"`    // PATH with the programs under test and ctr
	// Downstream is the path of Kata's shim, which can be a runtime of its own with [Testbed.KataConfig].
	Downstream string `json:"downstream"`

	Containerd process `json:"containerd"`
	CRI        *CRI    `json:"cri,omitempty"`        // where it serves the CRI, too
	SocketDir  string  `json:"socket_dir,omitempty"` // outside of Dir, where Dir is too deep for a socket's path

	containerd string // the program; known to whoever has made the testbed
}

const recordName = "testbed.json"

// Up makes a testbed and returns once its containerd serves and has the image. What a failed Up began, it takes away.
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
	// From here on there is something to take away, by a later `testbed down`, too.
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

// complete checks the options and fills in what was left out.
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

// WayOfKata finds which of Kata's shims is in a directory.
func WayOfKata(dir string) (Way, error) {
	configuration, err := os.ReadFile(filepath.Join(dir, "configuration.toml"))
	if err != nil {
		return "", fmt.Errorf("testbed: %w", err)
	}
	return wayOf(string(configuration)), nil
}

// claim makes the directory. One with a testbed's record is what is left of that testbed, and is taken away first; anything else in it is
// somebody's, and an error.
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
		return fmt.Errorf("testbed: %s is no testbed's, and not empty", dir)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("testbed: %w", err)
	}
	return nil
}

// Open finds the testbed in dir. A directory without one gives fs.ErrNotExist.
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
		return nil, fmt.Errorf("the testbed in %s was made as %s", dir, t.Dir)
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

// Client connects to the testbed's containerd. Closing it is the caller's.
func (t *Testbed) Client() (*client.Client, error) {
	c, err := client.New(t.Address, client.WithDefaultNamespace(Namespace))
	if err != nil {
		return nil, fmt.Errorf("connect to containerd: %w", err)
	}
	return c, nil
}

// Env is what a shell evaluates to work with the testbed.
func (t *Testbed) Env() string {
	env := fmt.Sprintf("export CONTAINERD_ADDRESS=%s\nexport CONTAINERD_NAMESPACE=%s\nexport RUNTIME=%s\nexport TESTBED_DIR=%s\nexport PATH=%s\n",
		quote(t.Address), Namespace, Runtime, quote(t.Dir), quote(t.Path))
	if t.CRI != nil {
		// crictl's.
		env += fmt.Sprintf("export CONTAINER_RUNTIME_ENDPOINT=%[1]s\nexport IMAGE_SERVICE_ENDPOINT=%[1]s\nexport RUNTIME_HANDLER=%[2]s\n", quote("unix://"+t.Address), Handler)
	}
	return env
}

// KataConfig is Kata's configuration, as derived for this testbed.
func (t *Testbed) KataConfig() string { return filepath.Join(t.Dir, "kata.toml") }

// ContainerdLog is what containerd and the shims have logged.
func (t *Testbed) ContainerdLog() string { return filepath.Join(t.logDir(), "containerd") }

// ConsoleLog is what the sandbox's guest has printed on its console: the kernel's and the agent's messages.
func (t *Testbed) ConsoleLog(sandbox string) string {
	return filepath.Join(t.logDir(), sandbox+".console")
}

// HybridSocket is the socket behind which the sandbox's guest has its vsock ports.
func (t *Testbed) HybridSocket(sandbox string) string {
	if t.Way == Rust {
		return filepath.Join("/run/kata", sandbox, "ch-vm.sock")
	}
	return filepath.Join("/run/vc/vm", sandbox, "clh.sock")
}

func (t *Testbed) logDir() string { return filepath.Join(t.Dir, "log") }
