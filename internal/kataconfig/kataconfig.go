// SPDX-License-Identifier: Apache-2.0

// Package kataconfig reads the configuration of Kata's shims as they do: a TOML
// file and the drop-ins beside it. It knows the settings that concern a
// checkpoint, and nothing of the rest.
//
// Written against Kata Containers 4.1.0 (src/runtime/pkg/katautils/config.go,
// src/libs/kata-types/src/config).
package kataconfig

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// Shim is one of Kata's shims. They read different files and share directories
// with the guest at different paths.
type Shim string

// Kata's shims.
const (
	Go   Shim = "go"
	Rust Shim = "rust"
)

// ParseVersion reads what a shim prints of its version. A shim that does not
// say which it is counts as Kata's Go shim.
func ParseVersion(output string) (shim Shim, version string) {
	shim = Go
	if strings.Contains(output, "(Rust)") {
		shim = Rust
	}
	return shim, versionPattern.FindString(output)
}

var versionPattern = regexp.MustCompile(`\d+\.\d+\.\d+(-[0-9A-Za-z.]+)?`)

// Defaults are the files of which a shim reads the first that exists, if nobody
// names one.
func (s Shim) Defaults() []string {
	const name = "configuration.toml"
	dirs := []string{"/etc/kata-containers", "/usr/share/defaults/kata-containers", "/opt/kata/share/defaults/kata-containers"}
	paths := make([]string, 0, len(dirs))
	for _, d := range dirs {
		if s == Rust {
			d = filepath.Join(d, "runtime-rs")
		}
		paths = append(paths, filepath.Join(d, name))
	}
	return paths
}

// shared is where the guest of a shim has what sandbox_bind_mounts names.
func (s Shim) shared() string {
	const dir = "/run/kata-containers/shared/containers"
	if s == Rust {
		return dir + "/passthrough/sandbox-mounts"
	}
	return dir + "/sandbox-mounts"
}

// HookPath is the guest_hook_path that finds the hooks of a guest bundle that
// is shared from the directory at bundle.
func (s Shim) HookPath(bundle string) string {
	return filepath.Join(s.shared(), filepath.Base(bundle), "hooks")
}

// Config is what a shim has read.
type Config struct {
	// Path is the file itself, without symbolic links.
	Path string
	// DropIns are the files that were merged over it, in their order.
	DropIns []string
	// Hypervisor is the name of the hypervisor's table, clh for example.
	Hypervisor string

	SharedFS          string
	Kernel            string
	Initrd            string
	KernelParams      string
	GuestHookPath     string
	SandboxBindMounts []string
}

// DropInDir is the directory of the drop-ins of the file.
func (c *Config) DropInDir() string { return filepath.Join(filepath.Dir(c.Path), "config.d") }

// ErrLink means that a drop-in is a symbolic link, or no file at all, which
// Kata's Rust shim does not accept.
var ErrLink = errors.New("not a regular file, which Kata's Rust shim does not accept")

// Load reads the file at path with its drop-ins, as the shim does, except for
// the drop-ins with the given names. Of several hypervisors it takes the one
// that the file's name has (configuration-clh.toml) or the first.
func Load(path string, shim Shim, except ...string) (*Config, error) {
	resolved, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, err
	}
	c := &Config{Path: resolved}
	tree, err := read(resolved)
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(c.DropInDir())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, e := range entries {
		if slices.Contains(except, e.Name()) {
			continue
		}
		file := filepath.Join(c.DropInDir(), e.Name())
		if shim == Rust && !e.Type().IsRegular() {
			return nil, fmt.Errorf("%s: %w", file, ErrLink)
		}
		over, err := read(file)
		if err != nil {
			return nil, err
		}
		merge(tree, over)
		c.DropIns = append(c.DropIns, file)
	}
	return c, c.settings(tree)
}

func read(path string) (map[string]any, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var tree map[string]any
	if err := toml.Unmarshal(data, &tree); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return tree, nil
}

// merge puts the values of over into tree: tables are merged, everything else
// is replaced, lists as a whole.
func merge(tree, over map[string]any) {
	for key, value := range over {
		table, ok := value.(map[string]any)
		below, is := tree[key].(map[string]any)
		if ok && is {
			merge(below, table)
			continue
		}
		tree[key] = value
	}
}

func (c *Config) settings(tree map[string]any) error {
	hypervisors, _ := tree["hypervisor"].(map[string]any)
	if len(hypervisors) == 0 {
		return fmt.Errorf("%s: there is no table [hypervisor.NAME]", c.Path)
	}
	names := slices.Sorted(maps.Keys(hypervisors))
	c.Hypervisor = names[0]
	for _, name := range names {
		if strings.Contains(filepath.Base(c.Path), name) {
			c.Hypervisor = name
		}
	}
	for table, values := range map[string][]struct {
		key string
		to  any
	}{
		"hypervisor": {
			{"shared_fs", &c.SharedFS},
			{"kernel", &c.Kernel},
			{"initrd", &c.Initrd},
			{"kernel_params", &c.KernelParams},
			{"guest_hook_path", &c.GuestHookPath},
		},
		"runtime": {
			{"sandbox_bind_mounts", &c.SandboxBindMounts},
		},
	} {
		from, _ := tree[table].(map[string]any)
		if table == "hypervisor" {
			from, _ = hypervisors[c.Hypervisor].(map[string]any)
		}
		for _, v := range values {
			if err := assign(v.to, from[v.key]); err != nil {
				return fmt.Errorf("%s: %s: %w", c.Path, v.key, err)
			}
		}
	}
	return nil
}

// assign stores a value of TOML, or nothing where there is none.
func assign(to, value any) error {
	if value == nil {
		return nil
	}
	ok := false
	switch to := to.(type) {
	case *string:
		*to, ok = value.(string)
	case *[]string:
		list, is := value.([]any)
		ok = is
		for _, v := range list {
			s, is := v.(string)
			ok = ok && is
			*to = append(*to, s)
		}
	}
	if !ok {
		return fmt.Errorf("%v is of the wrong type", value)
	}
	return nil
}
