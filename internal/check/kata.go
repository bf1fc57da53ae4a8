// SPDX-License-Identifier: Apache-2.0

package check

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/mod/semver"

	"github.com/kata-checkpoint/kata-checkpoint/internal/guestinitrd"
	"github.com/kata-checkpoint/kata-checkpoint/internal/kataconfig"
	"github.com/kata-checkpoint/kata-checkpoint/internal/version"
)

const minKata = "4.1.0"

// KernelOptions are what the guest's kernel must have built in, without the
// prefix CONFIG_: configs/kernel/kata-checkpoint.conf has the reasons.
var KernelOptions = []string{
	"CHECKPOINT_RESTORE",
	"UNIX_DIAG", "INET_DIAG", "INET_TCP_DIAG", "INET_UDP_DIAG", "INET_RAW_DIAG", "NETLINK_DIAG", "PACKET_DIAG",
	"TIME_NS", "NAMESPACES", "UTS_NS", "IPC_NS", "PID_NS", "NET_NS",
	"SYSVIPC", "POSIX_MQUEUE",
	"EVENTFD", "SIGNALFD", "TIMERFD", "MEMFD_CREATE", "USERFAULTFD", "AIO",
	"MEM_SOFT_DIRTY",
	"SECCOMP_FILTER",
	"NETFILTER", "NETFILTER_NETLINK", "NF_TABLES", "NF_TABLES_INET", "NF_TABLES_IPV4", "NF_TABLES_IPV6",
	"CGROUP_FREEZER", "FHANDLE", "PROC_PAGE_MONITOR", "RSEQ",
}

// optionalOption is the one that CRIU does without, and that arm64 lacks.
const optionalOption = "MEM_SOFT_DIRTY"

var number = regexp.MustCompile(`\d+(\.\d+)*`)

// atLeast compares versions; one that cannot be read is new enough.
func atLeast(version, minimum string) bool {
	v := number.FindString(version)
	return v == "" || semver.Compare("v"+v, "v"+minimum) >= 0
}

// kata looks at Kata's shim and at each configuration that our handlers name.
func (h *Host) kata(ctx context.Context, d *daemon, f *Findings) {
	search := os.Getenv("PATH")
	if d != nil {
		search = d.path
	}
	path, err := lookPath(h.Config.DownstreamShim, search)
	if err != nil {
		f.fail("kata.shim", "install Kata "+minKata+" or later, or set downstream_shim in config.toml to the path of its shim",
			"Kata's shim, %s, is not on containerd's PATH", h.Config.DownstreamShim)
		return
	}
	out, err := output(ctx, path, "--version")
	if err != nil {
		f.fail("kata.shim", "reinstall Kata, or set downstream_shim in config.toml to the path of its shim", "%s does not run: %v", path, err)
		return
	}
	shim, version := kataconfig.ParseVersion(out)
	if !atLeast(version, minKata) {
		f.fail("kata.shim", "install Kata "+minKata+" or later", "%s is Kata %s, which is too old", path, version)
	} else {
		f.ok("kata.shim", "%s, Kata's %s shim, version %s", path, map[kataconfig.Shim]string{kataconfig.Go: "Go", kataconfig.Rust: "Rust"}[shim], version)
	}
	for _, path := range h.kataConfigs(d, shim, f) {
		h.kataConfig(path, shim, f)
	}
}

// kataConfigs are the configurations of Kata in use: those of our handlers,
// and the one for engines that name none.
func (h *Host) kataConfigs(d *daemon, shim kataconfig.Shim, f *Findings) []string {
	paths := map[string]bool{}
	if h.Config.KataConfigPath != "" {
		paths[h.Config.KataConfigPath] = true
	}
	if d != nil {
		for _, r := range d.runtimes {
			if r.Options.ConfigPath != "" {
				paths[r.Options.ConfigPath] = true
			}
		}
	}
	if len(paths) > 0 {
		return slices.Sorted(maps.Keys(paths))
	}
	defaults := h.defaults
	if defaults == nil {
		defaults = shim.Defaults()
	}
	for _, path := range defaults {
		if _, err := os.Stat(path); err == nil {
			return []string{path}
		}
	}
	f.fail("kata.config", "set kata_config_path in config.toml to Kata's configuration.toml",
		"there is no configuration of Kata at any of its own paths (%s), and neither config.toml nor a runtime handler names one", strings.Join(defaults, ", "))
	return nil
}

// kataConfig looks at one configuration with its drop-ins.
func (h *Host) kataConfig(path string, shim kataconfig.Shim, f *Findings) {
	c, err := kataconfig.Load(path, shim)
	switch {
	case errors.Is(err, kataconfig.ErrLink):
		f.fail("kata.config", "replace it by a copy of the file that it leads to", "%v: containers fail to start", err)
		return
	case err != nil:
		f.fail("kata.config", "mend the file, or name another with kata_config_path in config.toml", "Kata's configuration cannot be read: %v", err)
		return
	}
	f.ok("kata.config", "%s", describe(c))

	// A drop-in of the right form is among our configs.
	dropIn := fmt.Sprintf("a drop-in in %s, as configs/kata/50-kata-checkpoint-%s.toml, with [hypervisor.%s] for the name of its table", c.DropInDir(), shim, c.Hypervisor)
	if c.SharedFS != "virtio-fs" && c.SharedFS != "virtio-fs-nydus" {
		f.fail("kata.shared_fs", `shared_fs = "virtio-fs" in `+dropIn, "%s: shared_fs is %q: there is no directory through which images could leave the guest", c.Path, c.SharedFS)
	} else {
		f.ok("kata.shared_fs", "%s", c.SharedFS)
	}
	if filepath.Clean(c.GuestHookPath) == guestinitrd.HookPath {
		initrd(c, dropIn, f)
	} else {
		h.sharedBundle(c, shim, dropIn, f)
	}
	h.kernel(c, f)
}

// sharedBundle looks whether guests get the agent from the guest bundle that is
// shared with them.
func (h *Host) sharedBundle(c *kataconfig.Config, shim kataconfig.Shim, dropIn string, f *Findings) {
	bundle := h.Config.GuestBundle
	if !slices.ContainsFunc(c.SandboxBindMounts, func(m string) bool { return filepath.Clean(strings.TrimSuffix(m, ":ro")) == filepath.Clean(bundle) }) {
		f.fail("kata.sandbox_bind_mounts", fmt.Sprintf("kata-checkpoint install, or sandbox_bind_mounts = %s in %s", quoteList(append(slices.Clone(c.SandboxBindMounts), bundle)), dropIn),
			"%s: sandbox_bind_mounts lacks the guest bundle, %s: no agent starts in the guest", c.Path, bundle)
	} else {
		f.ok("kata.sandbox_bind_mounts", "%s", bundle)
	}
	if want := shim.HookPath(bundle); filepath.Clean(c.GuestHookPath) != want {
		f.fail("kata.guest_hook_path", fmt.Sprintf("kata-checkpoint install, or guest_hook_path = %q in %s", want, dropIn),
			"%s: guest_hook_path is %q, where the guest has no hook of ours: no agent starts", c.Path, c.GuestHookPath)
	} else {
		f.ok("kata.guest_hook_path", "%s", want)
	}
}

// initrd looks whether guests have the agent in their initrd.
func initrd(c *kataconfig.Config, dropIn string, f *Findings) {
	const check = "kata.initrd"
	const again = "kata-checkpoint guest-initrd"
	if c.Initrd == "" {
		f.fail(check, again+", and initrd = the file that it makes in "+dropIn, "%s: guest_hook_path is where an initrd of ours has the agent, and no initrd is set", c.Path)
		return
	}
	r, err := guestinitrd.Read(c.Initrd)
	switch {
	case err != nil:
		f.fail(check, again+" --initrd FILE, and initrd = the file that it makes in "+dropIn, "%s: %v: no agent starts in the guest", c.Initrd, err)
	case r.Version != version.Version:
		f.warn(check, again, "%s has the agent %s, this is %s: adjacent minor releases work together, others may not", c.Initrd, r.Version, version.Version)
	default:
		f.ok(check, "%s with the agent %s", c.Initrd, r.Version)
	}
}

func describe(c *kataconfig.Config) string {
	if len(c.DropIns) == 0 {
		return c.Path
	}
	names := make([]string, len(c.DropIns))
	for i, d := range c.DropIns {
		names[i] = filepath.Base(d)
	}
	return c.Path + " with " + strings.Join(names, ", ")
}

func quoteList(values []string) string {
	for i, v := range values {
		values[i] = fmt.Sprintf("%q", v)
	}
	return "[" + strings.Join(values, ", ") + "]"
}

// kernel looks for the guest kernel and for the configuration that it was built
// with, which Kata installs beside its own (config-6.18.35-202 beside
// vmlinux-6.18.35-202).
func (h *Host) kernel(c *kataconfig.Config, f *Findings) {
	const check = "kata.kernel"
	cure := "kata-checkpoint guest-kernel && kata-checkpoint install"
	kernel, err := filepath.EvalSymlinks(c.Kernel)
	if err != nil {
		f.fail(check, cure, "%s: the guest kernel: %v", c.Path, err)
		return
	}
	missing, modules, err := LacksOptions(kernel)
	if errors.Is(err, fs.ErrNotExist) {
		f.warn(check, "put the configuration of the kernel beside it, as "+kernel+".config", "%s: it is not known with which options it was built", kernel)
		return
	}
	if err != nil {
		f.fail(check, cure, "%s: %v", kernel, err)
		return
	}
	switch {
	case len(missing) > 0:
		f.fail(check, cure, "%s lacks %s: CRIU does not work in the guest", kernel, strings.Join(missing, ", "))
	case len(modules) > 0:
		f.warn(check, cure, "%s has %s as modules: the guest has to load them, which Kata's own images do not", kernel, strings.Join(modules, ", "))
	default:
		f.ok(check, "%s has all options", kernel)
	}
}

// LacksOptions returns which of [KernelOptions] a kernel lacks, and which it has
// as modules, by the configuration beside it. Without one the error is
// fs.ErrNotExist.
func LacksOptions(kernel string) (missing, modules []string, err error) {
	config, err := kernelConfig(kernel)
	if err != nil {
		return nil, nil, err
	}
	missing, modules = lacks(config)
	return missing, modules, nil
}

func lacks(config map[string]string) (missing, modules []string) {
	for _, o := range KernelOptions {
		switch {
		case config[o] == "m":
			modules = append(modules, o)
		case config[o] != "y" && o != optionalOption:
			missing = append(missing, o)
		}
	}
	return missing, modules
}

// kernelConfig reads the configuration beside a kernel: the values of its
// options, by their names without prefix.
func kernelConfig(kernel string) (map[string]string, error) {
	dir, base := filepath.Split(kernel)
	names := []string{base + ".config"}
	for _, prefix := range []string{"vmlinux-", "vmlinuz-", "bzImage-"} {
		if version, ok := strings.CutPrefix(base, prefix); ok {
			names = append(names, "config-"+version)
		}
	}
	var file *os.File
	err := fs.ErrNotExist
	for _, name := range names {
		if file, err = os.Open(filepath.Join(dir, name)); err == nil {
			break
		}
	}
	if err != nil {
		return nil, err
	}
	defer file.Close()
	config := map[string]string{}
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), "=")
		if option, ok := strings.CutPrefix(name, "CONFIG_"); ok {
			config[option] = value
		}
	}
	return config, lines.Err()
}
