// SPDX-License-Identifier: Apache-2.0

// Package config reads the part of a Kata configuration file that the stand-in
// supports. The file's format is Kata's, and it tells which of Kata's shims it
// is for.
package config

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/way"
)

// DefaultPath is read if the engine's options name no file.
const DefaultPath = "/etc/kata-containers/configuration.toml"

// Config is a sandbox's configuration.
type Config struct {
	Way          way.Way
	VMM          string // path of the program with Cloud Hypervisor's API
	Kernel       string
	Initrd       string
	KernelParams string
	MemoryMiB    int64
	VCPUs        int32
	VirtioFSD    string
	VirtioFSArgs []string // virtio_fs_extra_args
	HookPath     string   // guest_hook_path, a directory in the guest
	DebugConsole bool
	// DialTimeout bounds the wait for the guest's agent.
	DialTimeout time.Duration
	// GuestSeccomp passes seccomp profiles to the guest.
	GuestSeccomp bool
	// NoNetwork ignores the network namespace's interfaces.
	NoNetwork bool
	// BindMounts are shared with the guest below sandbox-mounts/.
	BindMounts []BindMount
}

// BindMount is one entry of sandbox_bind_mounts.
type BindMount struct {
	Source   string
	Writable bool
}

type hypervisor struct {
	Path         string   `toml:"path"`
	Kernel       string   `toml:"kernel"`
	Initrd       string   `toml:"initrd"`
	KernelParams string   `toml:"kernel_params"`
	Memory       int64    `toml:"default_memory"`
	VCPUs        float64  `toml:"default_vcpus"`
	VirtioFSD    string   `toml:"virtio_fs_daemon"`
	VirtioFSArgs []string `toml:"virtio_fs_extra_args"`
	HookPath     string   `toml:"guest_hook_path"`
}

type file struct {
	Hypervisor map[string]hypervisor `toml:"hypervisor"`
	Agent      map[string]struct {
		DebugConsole       bool  `toml:"debug_console_enabled"`
		DialTimeout        int64 `toml:"dial_timeout"`
		ReconnectTimeoutMS int64 `toml:"reconnect_timeout_ms"`
	} `toml:"agent"`
	Runtime struct {
		Hypervisor string   `toml:"hypervisor_name"`
		BindMounts []string `toml:"sandbox_bind_mounts"`
		Model      string   `toml:"internetworking_model"`
		NoSeccomp  bool     `toml:"disable_guest_seccomp"`
	} `toml:"runtime"`
}

// tables are the names of the hypervisor table for Cloud Hypervisor.
var tables = []string{"clh", "cloud-hypervisor"}

// wayOf returns which shim a file is for: only the Rust shim's file names the
// hypervisor to use, the Go shim's may have one hypervisor only.
func (f *file) wayOf(table string) way.Way {
	if f.Runtime.Hypervisor != "" || table != "clh" {
		return way.Rust
	}
	return way.Go
}

// Load reads the file that the engine's options name, or Kata's default, with
// the drop-ins in config.d beside it.
func Load(path string) (*Config, error) {
	if path == "" {
		path = DefaultPath
	}
	raw, err := merged(path)
	if err != nil {
		return nil, fmt.Errorf("read the configuration: %w", err)
	}
	c, err := parse(raw)
	if err != nil {
		return nil, fmt.Errorf("read the configuration %s: %w", path, err)
	}
	return c, nil
}

// merged is the file with its drop-ins: tables are merged, everything else is
// replaced.
func merged(path string) ([]byte, error) {
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(filepath.Dir(path), "config.d")
	dropIns, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	files := []string{path}
	for _, d := range dropIns {
		files = append(files, filepath.Join(dir, d.Name()))
	}
	all := map[string]any{}
	for _, file := range files {
		raw, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		var values map[string]any
		if err := toml.Unmarshal(raw, &values); err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		merge(all, values)
	}
	return toml.Marshal(all)
}

func merge(into, values map[string]any) {
	for key, value := range values {
		table, ok := value.(map[string]any)
		below, is := into[key].(map[string]any)
		if ok && is {
			merge(below, table)
			continue
		}
		into[key] = value
	}
}

func parse(raw []byte) (*Config, error) {
	var f file
	if err := toml.Unmarshal(raw, &f); err != nil {
		return nil, err
	}
	for _, name := range tables {
		h, ok := f.Hypervisor[name]
		if !ok || f.Runtime.Hypervisor != "" && f.Runtime.Hypervisor != name {
			continue
		}
		w := f.wayOf(name)
		agent := f.Agent["kata"]
		c := &Config{
			Way:          w,
			VMM:          h.Path,
			Kernel:       h.Kernel,
			Initrd:       h.Initrd,
			KernelParams: h.KernelParams,
			MemoryMiB:    h.Memory,
			VCPUs:        int32(h.VCPUs),
			VirtioFSD:    h.VirtioFSD,
			VirtioFSArgs: h.VirtioFSArgs,
			HookPath:     h.HookPath,
			DebugConsole: agent.DebugConsole,
			DialTimeout:  45 * time.Second,
			GuestSeccomp: !f.Runtime.NoSeccomp,
			NoNetwork:    f.Runtime.Model == "none",
		}
		if c.MemoryMiB <= 0 {
			c.MemoryMiB = 2048
		}
		if c.VCPUs <= 0 {
			c.VCPUs = 1
		}
		if w == way.Go && agent.DialTimeout > 0 {
			c.DialTimeout = time.Duration(agent.DialTimeout) * time.Second
		}
		if w == way.Rust && agent.ReconnectTimeoutMS > 0 {
			c.DialTimeout = time.Duration(agent.ReconnectTimeoutMS) * time.Millisecond
		}
		for _, entry := range f.Runtime.BindMounts {
			c.BindMounts = append(c.BindMounts, bindMount(w, entry))
		}
		for what, value := range map[string]string{"path": c.VMM, "kernel": c.Kernel, "initrd": c.Initrd, "virtio_fs_daemon": c.VirtioFSD} {
			if value == "" {
				return nil, fmt.Errorf("hypervisor.%s has no %s", name, what)
			}
		}
		return c, nil
	}
	return nil, errors.New("no hypervisor table for Cloud Hypervisor")
}

// seccompAnnotation overrides disable_guest_seccomp for a sandbox (Kata 4.1.0:
// src/runtime/virtcontainers/pkg/annotations and src/libs/kata-types).
const seccompAnnotation = "io.katacontainers.config.runtime.disable_guest_seccomp"

// Override changes the configuration by the annotations of a sandbox's own
// container.
func (c *Config) Override(annotations map[string]string) error {
	value := annotations[seccompAnnotation]
	if value == "" {
		return nil
	}
	disable, err := strconv.ParseBool(value)
	if err != nil {
		return fmt.Errorf("annotation %s: %w", seccompAnnotation, err)
	}
	c.GuestSeccomp = !disable
	return nil
}

// bindMount parses one entry. Only the Rust shim supports a mode after a colon;
// the Go shim shares everything read-only.
func bindMount(w way.Way, entry string) BindMount {
	if w == way.Rust {
		if source, ok := strings.CutSuffix(entry, ":rw"); ok {
			return BindMount{Source: source, Writable: true}
		}
		entry = strings.TrimSuffix(entry, ":ro")
	}
	return BindMount{Source: entry}
}
