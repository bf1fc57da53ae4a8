// SPDX-License-Identifier: Apache-2.0

// Package install puts kata-checkpoint on a node and takes it off again: the
// binaries, the guest bundle, config.toml, and the drop-ins of containerd and of
// Kata. What others have written is never changed.
//
// [Prepare] and [PrepareRemoval] look at the node and return a [Plan], which
// can be shown as a diff and carried out.
package install

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	continuity "github.com/containerd/continuity/fs"

	"github.com/kata-checkpoint/kata-checkpoint/configs"
	"github.com/kata-checkpoint/kata-checkpoint/internal/check"
	"github.com/kata-checkpoint/kata-checkpoint/internal/config"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/kataconfig"
)

// Default paths.
const (
	DefaultDir              = "/opt/kata-checkpoint"
	DefaultBinDir           = "/usr/local/bin"
	DefaultContainerdConfig = "/etc/containerd/config.toml"
	DefaultNRIPlugins       = "/opt/nri/plugins"
	// DefaultPath is the PATH on which containerd finds Kata's shim, and criu.
	DefaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

	dropInName = "50-kata-checkpoint.toml"
	// KernelName is the guest kernel's file below Dir.
	KernelName = "share/vmlinux-kata-checkpoint"
)

// Binaries of the release that a node needs.
const (
	cliName = "kata-checkpoint"
	nriName = "kata-checkpoint-nri"
)

// Options describes a node and what is to be installed. All paths are those that
// the node's programs use.
type Options struct {
	// Release is the directory of a release, with bin/ and guest-bundle/. It is
	// not below Root.
	Release string
	Version string

	// Root is where the node's file system is, / if it is empty.
	Root string
	// Dir is the directory of the guest bundles.
	Dir string
	// BinDir has to be on containerd's PATH.
	BinDir string
	// Config is our configuration. An existing one is respected.
	Config string
	// ContainerdConfig is containerd's main configuration.
	ContainerdConfig string
	// NRIPlugins is the directory from which containerd starts NRI plugins; no
	// plugin is installed if it is empty.
	NRIPlugins string
	// Path is containerd's PATH.
	Path string

	// KataShim is the path of Kata's shim; it is looked for if it is empty.
	KataShim string
	// KataConfig is Kata's configuration; the one that the shim reads by default
	// if it is empty.
	KataConfig string
	// Kernel is the guest kernel; if it is empty, the one below Dir if there is
	// one, or Kata's.
	Kernel string

	// Given reports whether a flag of the command was given. The others have the
	// values with which the installed release was installed. It may be nil.
	Given func(flag string) bool

	// ShimVersion runs a shim of the node with --version. Tests replace it.
	ShimVersion func(ctx context.Context, path string) (string, error)
	// Proc is where procfs is mounted, /proc if it is empty.
	Proc string
}

// at returns where a path of the node is. What its directories lead to stays
// below Root.
func (o *Options) at(path string) string {
	if o.Root == "" || o.Root == "/" {
		return path
	}
	dir, err := continuity.RootPath(o.Root, filepath.Dir(path))
	if err != nil {
		dir = filepath.Join(o.Root, filepath.Dir(path)) // using it says what is wrong
	}
	return filepath.Join(dir, filepath.Base(path))
}

// resolved is the path of the node that a path leads to.
func (o *Options) resolved(path string) (string, error) {
	if o.Root == "" || o.Root == "/" {
		return filepath.EvalSymlinks(path)
	}
	target, err := continuity.RootPath(o.Root, path)
	if err != nil {
		return "", err
	}
	if _, err := os.Lstat(target); err != nil {
		return "", err
	}
	return o.node(target), nil
}

// node is the path on the node of a file below Root.
func (o *Options) node(target string) string {
	if o.Root == "" || o.Root == "/" {
		return target
	}
	return "/" + strings.TrimPrefix(strings.TrimPrefix(target, filepath.Clean(o.Root)), "/")
}

// entry is a file that should be on the node.
type entry struct {
	path string
	mode fs.FileMode
	data []byte
	link string // for symbolic links, in place of data
	// yields means that what somebody else has put there is as good.
	yields bool
}

func (e *entry) content() *content {
	if e.link != "" {
		return &content{exists: true, mode: fs.ModeSymlink, link: e.link}
	}
	return &content{exists: true, mode: e.mode, data: e.data}
}

// Prepare finds out what has to be done to install a release on a node.
func Prepare(ctx context.Context, o *Options) (*Plan, error) {
	if o.ShimVersion == nil {
		o.ShimVersion = o.runShim
	}
	tree, err := readTree(filepath.Join(o.Release, "guest-bundle"))
	if err != nil {
		return nil, errcode.NoRelease.Errorf("no release of kata-checkpoint is in %s: run install from the release that you have unpacked, or name its directory with --from: %w", o.Release, err)
	}
	r, err := o.readRecord()
	if err != nil {
		return nil, err
	}
	o.remember(r)
	p := &Plan{o: o, record: r, tree: tree, RuntimeClass: configs.RuntimeClass}
	k, err := o.findKata(ctx)
	if err != nil {
		return nil, err
	}
	own, foreign, err := o.ownConfig(k, r)
	if err != nil {
		return nil, err
	}
	bundle := o.Dir + "/guest"
	if foreign != nil {
		p.notef("%s is yours and stays as it is", o.Config)
		bundle = foreign.GuestBundle
		if foreign.KataConfigPath != "" && k.own {
			p.todof("set kata_config_path = %q in %s", k.config, o.Config)
		}
	}
	// Kata's Go shim names it in the guest as the link, its Rust shim as what the
	// link leads to.
	p.release = o.Dir + "/releases/" + o.Version + "-" + tree.digest[:12] + "/" + filepath.Base(bundle)

	entries, err := o.binaries()
	if err != nil {
		return nil, err
	}
	entries = append([]*entry{{path: bundle, link: p.release}}, entries...)
	if foreign == nil {
		entries = append(entries, own)
	}
	kata, err := k.entries(o, bundle, p)
	if err != nil {
		return nil, err
	}
	entries = append(entries, kata...)
	containerd, err := o.containerd(k.config, p)
	if err != nil {
		return nil, err
	}
	entries = append(entries, containerd...)
	if !slices.ContainsFunc(filepath.SplitList(o.Path), func(dir string) bool { return dir != o.BinDir && o.isExecutable(dir+"/criu") }) {
		entries = append(entries, &entry{path: o.BinDir + "/criu", link: bundle + "/bin/criu", yields: true})
	}
	if !slices.Contains(filepath.SplitList(o.Path), o.BinDir) {
		p.todof("add %s to the PATH of containerd, in the Environment of its service", o.BinDir)
	}
	return p, p.compare(entries)
}

// binaries are those of the release. The command itself is only installed where
// no package has done that.
func (o *Options) binaries() ([]*entry, error) {
	files := [][2]string{{check.ShimName, o.BinDir + "/" + check.ShimName}}
	if _, err := os.Stat(o.at("/usr/bin/" + cliName)); err != nil {
		files = append(files, [2]string{cliName, o.BinDir + "/" + cliName})
	}
	if o.NRIPlugins != "" {
		files = append(files, [2]string{nriName, o.NRIPlugins + "/90-" + check.NRIPluginName})
	}
	var entries []*entry
	for _, f := range files {
		data, err := os.ReadFile(filepath.Join(o.Release, "bin", f[0]))
		if err != nil {
			return nil, errcode.NoRelease.Errorf("the release in %s is not whole: %w", o.Release, err)
		}
		entries = append(entries, &entry{path: f[1], mode: 0o755, data: data})
	}
	return entries, nil
}

// ownConfig is our configuration: what we write, or what the operator has
// written.
func (o *Options) ownConfig(k *kata, r *record) (*entry, *config.Config, error) {
	text, err := setKeys(configs.Config, map[string]string{
		"downstream_shim":  k.shimSetting,
		"kata_config_path": k.config,
		"guest_bundle":     o.Dir + "/guest",
	})
	if err != nil {
		return nil, nil, err
	}
	found, err := o.look(o.Config)
	if err != nil {
		return nil, nil, err
	}
	if found.exists && !r.wrote(o.Config, found.digest()) {
		cfg, err := config.Load(o.at(o.Config))
		return nil, cfg, err
	}
	return &entry{path: o.Config, mode: 0o644, data: []byte(text)}, nil, nil
}

// setKeys sets keys of a TOML file that has each on a line of its own.
func setKeys(text string, values map[string]string) (string, error) {
	lines := strings.Split(text, "\n")
	for key, value := range values {
		i := slices.IndexFunc(lines, func(l string) bool { return strings.HasPrefix(l, key+" = ") })
		if i < 0 {
			return "", fmt.Errorf("config.toml has no key %s", key)
		}
		lines[i] = key + " = " + strconv.Quote(value)
	}
	return strings.Join(lines, "\n"), nil
}

func (o *Options) isExecutable(path string) bool {
	target, err := o.resolved(path)
	if err != nil {
		return false
	}
	st, err := os.Stat(o.at(target))
	return err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0
}

// runShim asks a shim for its version.
func (o *Options) runShim(ctx context.Context, path string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, "--version")
	if o.Root != "" && o.Root != "/" {
		cmd.SysProcAttr = chroot(o.Root)
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", errcode.NoKata.Errorf("the shim of Kata, %s, does not run: %w: %s", path, err, strings.TrimSpace(string(out)))
	}
	return string(out), nil
}

// Systemctl has the node's systemd do something.
func (o *Options) Systemctl(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, "systemctl", args...)
	if o.Root != "" && o.Root != "/" {
		cmd.Path, cmd.Err = "/usr/bin/systemctl", nil // of the node
		cmd.SysProcAttr = chroot(o.Root)
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		return errcode.Systemctl.Errorf("systemctl %s: %w: %s: repeat it by hand", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

// conflicts makes one error of what is in the way.
func conflicts(paths []string) error {
	if len(paths) == 0 {
		return nil
	}
	var errs []error
	for _, path := range paths {
		errs = append(errs, errcode.ForeignFile.Errorf("%s exists and was not written by kata-checkpoint install: move it away", path))
	}
	return errclass.Join(errs...)
}

var errNoKata = errcode.NoKata.Wrap(errors.New("there is no Kata on this node"))

// kata is the Kata of a node.
type kata struct {
	shim kataconfig.Shim
	// shimSetting is the value of downstream_shim.
	shimSetting string
	// config is the configuration that our runtime uses; base is the one that
	// Kata has installed. They differ where Kata's has neighbours that a drop-in
	// would break: then config is a copy of our own.
	config, base string
	own          bool
	loaded       *kataconfig.Config
}
