// SPDX-License-Identifier: Apache-2.0

package install

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/kata-checkpoint/kata-checkpoint/internal/check"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/guestinitrd"
	"github.com/kata-checkpoint/kata-checkpoint/internal/kataconfig"
)

const kataShim = "containerd-shim-kata-v2"

// kataDirs are where Kata's own installers put its shims.
var kataDirs = []string{"/opt/kata/bin", "/opt/kata/runtime-rs/bin"}

// findKata looks for Kata's shim and its configuration.
func (o *Options) findKata(ctx context.Context) (*kata, error) {
	k := &kata{shimSetting: kataShim}
	shim := o.KataShim
	if shim == "" {
		for _, dir := range slices.Concat(filepath.SplitList(o.Path), kataDirs) {
			if o.isExecutable(dir + "/" + kataShim) {
				shim = dir + "/" + kataShim
				break
			}
		}
	}
	if shim == "" || !o.isExecutable(shim) {
		return nil, fmt.Errorf("%w: %s is neither on containerd's PATH nor in %s: install Kata Containers 4.1 or later, or name its shim with --kata-shim",
			errNoKata, kataShim, strings.Join(kataDirs, " or "))
	}
	if !slices.Contains(filepath.SplitList(o.Path), filepath.Dir(shim)) {
		k.shimSetting = shim
	}
	out, err := o.ShimVersion(ctx, shim)
	if err != nil {
		return nil, err
	}
	k.shim, _ = kataconfig.ParseVersion(out)

	base := o.KataConfig
	if base == "" {
		for _, path := range k.shim.Defaults() {
			if _, err := o.resolved(path); err == nil {
				base = path
				break
			}
		}
	}
	if base == "" {
		return nil, errcode.KataConfig.Errorf("there is no configuration of Kata at any of its own paths (%s): name it with --kata-config", strings.Join(k.shim.Defaults(), ", "))
	}
	if k.base, err = o.resolved(base); err != nil {
		return nil, errcode.KataConfig.Errorf("the configuration of Kata: %w: name it with --kata-config", err)
	}
	if k.loaded, err = kataconfig.Load(o.at(k.base), k.shim, dropInName); err != nil {
		return nil, errcode.KataConfig.Errorf("the configuration of Kata cannot be read: %w", err)
	}
	k.config = base
	neighbours, err := o.neighbours(k)
	if err != nil {
		return nil, err
	}
	if neighbours {
		k.own = true
		k.config = filepath.Dir(o.Config) + "/kata/" + filepath.Base(k.base)
	}
	return k, nil
}

// neighbours reports whether configurations of other hypervisors are in the same
// directory. Its drop-ins are merged into each of them, and Kata does not
// accept a table of a second hypervisor.
func (o *Options) neighbours(k *kata) (bool, error) {
	files, err := filepath.Glob(o.at(filepath.Dir(k.base) + "/configuration*.toml"))
	if err != nil {
		return false, err
	}
	for _, file := range files {
		target, err := o.resolved(o.node(file))
		if err != nil || filepath.Dir(target) != filepath.Dir(k.base) {
			continue // a broken link, or a file with other drop-ins
		}
		other, err := kataconfig.Load(o.at(target), k.shim, dropInName)
		if err == nil && other.Hypervisor != k.loaded.Hypervisor {
			return true, nil
		}
	}
	return false, nil
}

// entries are Kata's drop-in and, where it has to have a directory of its own, a
// copy of Kata's configuration with the other drop-ins.
func (k *kata) entries(o *Options, bundle string, p *Plan) ([]*entry, error) {
	var entries []*entry
	if k.own {
		files := []string{k.base}
		for _, d := range k.loaded.DropIns {
			files = append(files, o.node(d))
		}
		for i, file := range files {
			data, err := os.ReadFile(o.at(file))
			if err != nil {
				return nil, err
			}
			to := k.config
			if i > 0 {
				to = filepath.Dir(k.config) + "/config.d/" + filepath.Base(file)
			}
			entries = append(entries, &entry{path: to, mode: 0o644, data: data})
		}
		p.notef("%s is a copy of %s, whose directory has configurations of other hypervisors: install again after an upgrade of Kata", k.config, k.base)
	}
	resolved := k.base
	if k.own {
		resolved = k.config
	}
	want := k.shim.HookPath(bundle)
	// An initrd of ours has the agent, and its hook.
	inInitrd := filepath.Clean(k.loaded.GuestHookPath) == guestinitrd.HookPath
	if hooks := k.loaded.GuestHookPath; hooks != "" && !inInitrd && filepath.Clean(hooks) != want {
		return nil, errcode.ForeignHooks.Errorf("%s has guest_hook_path = %q, which a drop-in would replace: put these hooks into %s/hooks of the release and remove the setting", k.base, hooks, "guest-bundle")
	}
	if fsys := k.loaded.SharedFS; fsys != "virtio-fs" && fsys != "virtio-fs-nydus" {
		return nil, errcode.SharedFS.Errorf("%s has shared_fs = %q, and images leave the guest over virtio-fs: name another configuration with --kata-config", k.base, fsys)
	}
	kernel, err := k.kernel(o, p)
	if err != nil {
		return nil, err
	}
	var b strings.Builder
	b.WriteString("# Written by `kata-checkpoint install`, and removed by `kata-checkpoint uninstall`.\n# A drop-in whose name sorts behind this one overrides it.\n")
	fmt.Fprintf(&b, "[hypervisor.%s]\n", k.loaded.Hypervisor)
	if kernel != "" {
		fmt.Fprintf(&b, "kernel = %s\n", strconv.Quote(kernel))
	}
	if inInitrd {
		if r, err := guestinitrd.Read(o.at(k.loaded.Initrd)); err != nil || r.Version != o.Version {
			p.todof("run kata-checkpoint guest-initrd: the initrd that Kata boots, %q, does not have the agent of this release", k.loaded.Initrd)
		}
		return append(entries, &entry{path: filepath.Dir(resolved) + "/config.d/" + dropInName, mode: 0o644, data: []byte(b.String())}), nil
	}
	fmt.Fprintf(&b, "guest_hook_path = %s\n\n[runtime]\n", strconv.Quote(want))
	mounts := slices.DeleteFunc(slices.Clone(k.loaded.SandboxBindMounts), func(m string) bool { return m == bundle })
	for i, m := range append(mounts, bundle) {
		mounts = append(mounts[:i], strconv.Quote(m))
	}
	fmt.Fprintf(&b, "sandbox_bind_mounts = [%s]\n", strings.Join(mounts, ", "))
	return append(entries, &entry{path: filepath.Dir(resolved) + "/config.d/" + dropInName, mode: 0o644, data: []byte(b.String())}), nil
}

// kernel returns the guest kernel that the drop-in names, none if Kata's will
// do.
func (k *kata) kernel(o *Options, p *Plan) (string, error) {
	kernel := o.Kernel
	if kernel == "" {
		kernel = o.Dir + "/" + KernelName
		if _, err := o.resolved(kernel); err != nil {
			kernel = ""
		}
	}
	effective := kernel
	if effective == "" {
		effective = k.loaded.Kernel
	}
	target, err := o.resolved(effective)
	if err != nil || effective == "" {
		if kernel != "" {
			return "", errcode.GuestKernel.Errorf("the guest kernel: %w", err)
		}
		p.todof("give Kata a guest kernel: %s names %q, which does not exist", k.base, effective)
		return "", nil
	}
	missing, modules, err := check.LacksOptions(o.at(target))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		p.notef("the configuration of the guest kernel %s is not beside it, so that its options are not known", effective)
	case err != nil:
		return "", err
	case len(missing) > 0 && kernel != "":
		return "", errcode.GuestKernel.Errorf("the guest kernel %s lacks %s: build one with kata-checkpoint guest-kernel", effective, strings.Join(missing, ", "))
	case len(missing) > 0:
		p.todof("build a guest kernel with `kata-checkpoint guest-kernel` and run install again: %s lacks %s, and until then every checkpoint is refused", effective, strings.Join(missing, ", "))
	case len(modules) > 0:
		p.notef("the guest kernel %s has %s as modules, which the guest has to load", effective, strings.Join(modules, ", "))
	}
	return kernel, nil
}
