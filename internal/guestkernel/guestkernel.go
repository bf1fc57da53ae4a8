// SPDX-License-Identifier: Apache-2.0

// Package guestkernel builds a kernel for Kata's guests from a distribution's
// kernel sources: with the configuration of Kata's own kernel and the options
// that CRIU needs (configs/kernel).
package guestkernel

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/mod/semver"

	"github.com/kata-checkpoint/kata-checkpoint/configs"
	"github.com/kata-checkpoint/kata-checkpoint/internal/check"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
)

const (
	// Name is the file name of the kernel that is built.
	Name = "vmlinux-kata-checkpoint"
	// compressed is the same kernel, compressed, for QEMU.
	compressed = "vmlinuz-kata-checkpoint"
	configName = ".config"
	// localVersion is appended to the kernel's version.
	localVersion = "-kata-checkpoint"
)

// Options describes a build.
type Options struct {
	// Source is a directory or a .tar.xz with the kernel's sources; the newest of
	// Debian's packages linux-source-* that is installed if it is empty.
	Source string
	// KataConfig is the configuration that Kata's kernel was built with; the one
	// that Kata has installed if it is empty.
	KataConfig string
	// KataSource is a directory with Kata's sources, whose fragments are taken in
	// place of KataConfig.
	KataSource string
	// Out is where the kernel and its configuration are put.
	Out string
	// Work is where it is built; a temporary directory if it is empty.
	Work string
	Jobs int
	// ConfigOnly ends with the configuration, which is put into Out.
	ConfigOnly bool
	// Arch is Go's name of the architecture.
	Arch string
	// Output gets what make prints.
	Output io.Writer
	// Step is told what begins, a sentence each.
	Step func(format string, args ...any)
}

// arch is what the kernel's build calls an architecture.
type arch struct {
	name, fragments string
	// targets of make, and the files that they make.
	targets              []string
	vmlinux, compressed  string
	needsNoMemSoftDirty  bool
	fragmentsOfOtherArch string
}

var arches = map[string]arch{
	"amd64": {name: "x86_64", fragments: "x86_64", targets: []string{"vmlinux", "bzImage"}, vmlinux: "vmlinux", compressed: "arch/x86/boot/bzImage", fragmentsOfOtherArch: "!x86_64"},
	"arm64": {
		name: "arm64", fragments: "arm64", targets: []string{"Image", "Image.gz"}, vmlinux: "arch/arm64/boot/Image",
		compressed: "arch/arm64/boot/Image.gz", needsNoMemSoftDirty: true, fragmentsOfOtherArch: "!arm64",
	},
}

// Kernel is what was built.
type Kernel struct {
	// Path is the kernel, or its configuration if that was all.
	Path string
	// Release is its version.
	Release string
	// Dropped are the options of Kata's configuration that these sources do not
	// have, or not in the same way, without those of which Kata's sources say so.
	Dropped []string
}

// Build builds a kernel, which replaces an earlier one as a whole.
func Build(ctx context.Context, o *Options) (*Kernel, error) {
	if o.Arch == "" {
		o.Arch = runtime.GOARCH
	}
	a, ok := arches[o.Arch]
	if !ok {
		return nil, errcode.KernelArch.Errorf("guest kernels are built for amd64 and arm64, not for %s", o.Arch)
	}
	if err := haveTools(); err != nil {
		return nil, err
	}
	if err := o.find(); err != nil {
		return nil, err
	}
	work, err := o.absolute()
	if err != nil {
		return nil, err
	}
	if work == "" {
		// Not below /tmp, which may be in memory.
		if work, err = os.MkdirTemp("/var/tmp", "kata-checkpoint-kernel-"); err != nil {
			return nil, err
		}
		defer os.RemoveAll(work)
	}
	b := &build{Options: o, arch: a, objects: filepath.Join(work, "build")}
	if err := b.unpack(ctx, work); err != nil {
		return nil, err
	}
	return b.run(ctx)
}

// absolute makes the paths that reach make, which runs elsewhere, independent of
// the working directory, and returns that of Work, empty if there is none.
func (o *Options) absolute() (work string, err error) {
	if o.Source, err = filepath.Abs(o.Source); err != nil || o.Work == "" {
		return "", err
	}
	return filepath.Abs(o.Work)
}

// step tells what begins.
func (o *Options) step(format string, args ...any) {
	if o.Step != nil {
		o.Step(format, args...)
	}
}

// tools are what the kernel's build runs, and the Debian packages that have
// them.
var tools = [][2]string{{"make", "make"}, {"gcc", "gcc"}, {"flex", "flex"}, {"bison", "bison"}, {"bc", "bc"}, {"xz", "xz-utils"}, {"tar", "tar"}, {"perl", "perl"}}

// libelf is a header that the build includes.
var libelf = "/usr/include/libelf.h"

func haveTools() error {
	var missing []string
	for _, t := range tools {
		if _, err := exec.LookPath(t[0]); err != nil {
			missing = append(missing, t[1])
		}
	}
	if _, err := os.Stat(libelf); err != nil {
		missing = append(missing, "libelf-dev")
	}
	if len(missing) > 0 {
		return errcode.KernelTools.Errorf("a kernel's build needs %s: apt-get install %[1]s", strings.Join(missing, " "))
	}
	return nil
}

// find looks for the sources and for Kata's configuration.
func (o *Options) find() error {
	if o.Source == "" {
		found, err := newest("/usr/src/linux-source-*.tar.xz")
		if err != nil {
			return err
		}
		if found == "" {
			return errcode.KernelSources.Wrap(errors.New("there are no kernel sources: apt-get install linux-source-6.12 (from bookworm-backports or trixie), or name a directory or a .tar.xz with --source"))
		}
		o.Source = found
	}
	if o.KataSource != "" || o.KataConfig != "" {
		return nil
	}
	found, err := newest("/opt/kata/share/kata-containers/config-*", "/usr/share/kata-containers/config-*", "/usr/local/share/kata-containers/config-*")
	if err != nil {
		return err
	}
	if found == "" {
		return errcode.KernelBase.Wrap(errors.New("the configuration of Kata's own kernel is not on this machine: name it with --kata-config (share/kata-containers/config-VERSION-N of a Kata release), or Kata's sources with --kata-src"))
	}
	o.KataConfig = found
	return nil
}

var versionInName = regexp.MustCompile(`\d+(\.\d+)+`)

// newest returns the file with the highest version in its name, without those
// for debugging, confidential guests and GPUs.
func newest(patterns ...string) (string, error) {
	var files []string
	for _, pattern := range patterns {
		found, err := filepath.Glob(pattern)
		if err != nil {
			return "", err
		}
		files = append(files, found...)
	}
	files = slices.DeleteFunc(files, func(f string) bool { return special.MatchString(filepath.Base(f)) })
	if len(files) == 0 {
		return "", nil
	}
	return slices.MaxFunc(files, func(a, b string) int {
		return semver.Compare("v"+versionInName.FindString(filepath.Base(a)), "v"+versionInName.FindString(filepath.Base(b)))
	}), nil
}

var special = regexp.MustCompile(`-(debug|confidential|nvidia|dragonball|sev|snp|tdx|arm)`)

// build is one build.
type build struct {
	*Options
	arch
	source, objects string
	// base has the options of Kata's configuration.
	base map[string]string
	// mayLack are options of Kata's that not every kernel has, by Kata's own list.
	mayLack map[string]bool
}

// unpack makes the sources a directory.
func (b *build) unpack(ctx context.Context, work string) error {
	st, err := os.Stat(b.Source)
	if err != nil {
		return errcode.KernelSources.Errorf("kernel sources: %w", err)
	}
	b.source = b.Source
	if !st.IsDir() {
		b.source = filepath.Join(work, "source")
		if err := os.RemoveAll(b.source); err != nil {
			return err
		}
		if err := os.MkdirAll(b.source, 0o755); err != nil {
			return err
		}
		b.step("unpacking %s", b.Source)
		if err := finish(b.command(ctx, "tar", "-C", b.source, "--strip-components=1", "-xf", b.Source)); err != nil {
			return errcode.KernelSources.Errorf("unpack %s: %w", b.Source, err)
		}
	}
	if _, err := os.Stat(filepath.Join(b.source, "Kconfig")); err != nil {
		return errcode.KernelSources.Errorf("%s has no kernel sources: %w", b.Source, err)
	}
	return os.MkdirAll(b.objects, 0o755)
}

func (b *build) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdout, cmd.Stderr = b.Output, b.Output
	// The configuration must not depend on the environment.
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "KCONFIG_") && !strings.HasPrefix(v, "ARCH=") && !strings.HasPrefix(v, "LOCALVERSION=") {
			cmd.Env = append(cmd.Env, v)
		}
	}
	return cmd
}

func (b *build) make(ctx context.Context, env []string, targets ...string) error {
	args := append([]string{"-C", b.source, "O=" + b.objects, "ARCH=" + b.name, "-j" + strconv.Itoa(max(1, b.Jobs))}, targets...)
	cmd := b.command(ctx, "make", args...)
	cmd.Env = append(cmd.Env, env...)
	if err := finish(cmd); err != nil {
		return errcode.KernelBuild.Errorf("make %s: %w", strings.Join(targets, " "), err)
	}
	return nil
}

// finish runs a command. Its error has the end of what it printed to stderr.
func finish(cmd *exec.Cmd) error {
	var tail lastLines
	cmd.Stderr = io.MultiWriter(cmd.Stderr, &tail)
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%w: %s", err, tail.String())
	}
	return nil
}

func (b *build) run(ctx context.Context) (*Kernel, error) {
	if err := b.configure(ctx); err != nil {
		return nil, err
	}
	k := &Kernel{}
	var err error
	if k.Dropped, err = b.compare(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(b.Out, 0o755); err != nil {
		return nil, err
	}
	if b.ConfigOnly {
		k.Path = filepath.Join(b.Out, Name+".config")
		return k, install(filepath.Join(b.objects, configName), k.Path)
	}
	b.step("compiling, which takes a quarter of an hour on two cores")
	if err := b.make(ctx, nil, b.targets...); err != nil {
		return nil, err
	}
	release, err := os.ReadFile(filepath.Join(b.objects, "include/config/kernel.release"))
	if err != nil {
		return nil, err
	}
	k.Release, k.Path = strings.TrimSpace(string(release)), filepath.Join(b.Out, Name)
	for _, f := range [][2]string{
		{configName, compressed + ".config"}, {b.compressed, compressed}, {configName, Name + ".config"}, {b.vmlinux, Name},
	} {
		if err := install(filepath.Join(b.objects, f[0]), filepath.Join(b.Out, f[1])); err != nil {
			return nil, err
		}
	}
	return k, nil
}

// fragment is the options that CRIU needs, for an architecture.
func (a *arch) fragment() string {
	text := configs.KernelFragment
	if a.needsNoMemSoftDirty {
		text = strings.ReplaceAll(text, "CONFIG_MEM_SOFT_DIRTY=y\n", "")
	}
	return text + "CONFIG_LOCALVERSION=\"" + localVersion + "\"\n# CONFIG_LOCALVERSION_AUTO is not set\n"
}

// configure makes the configuration: Kata's, and our options behind it.
func (b *build) configure(ctx context.Context) error {
	b.step("configuring, with Kata's options from %s", cmp.Or(b.KataSource, b.KataConfig))
	path := filepath.Join(b.objects, configName)
	if b.KataSource == "" {
		base, err := os.ReadFile(b.KataConfig)
		if err != nil {
			return errcode.KernelBase.Errorf("the configuration of Kata's kernel: %w", err)
		}
		if b.base = options(base); len(b.base) == 0 {
			return errcode.KernelBase.Errorf("%s is no kernel configuration", b.KataConfig)
		}
		if err := os.WriteFile(path, append(withLast(base), b.fragment()...), 0o644); err != nil {
			return err
		}
		return b.make(ctx, nil, "olddefconfig")
	}
	// What is not named is off, as in Kata's own build.
	fragments, err := b.fragments()
	if err != nil {
		return err
	}
	b.base = options(fragments)
	all := filepath.Join(b.objects, "all.config")
	if err := os.WriteFile(all, append(fragments, b.fragment()...), 0o644); err != nil {
		return err
	}
	return b.make(ctx, []string{"KCONFIG_ALLCONFIG=" + all}, "allnoconfig")
}

// withLast ends a text with a line break.
func withLast(text []byte) []byte { return append(bytes.TrimRight(text, "\n"), '\n') }

// fragments are those that Kata's build script takes for an ordinary guest
// (Kata 4.1.0: tools/packaging/kernel/build-kernel.sh, get_kernel_frag_path).
func (b *build) fragments() ([]byte, error) {
	dir := filepath.Join(b.KataSource, "tools/packaging/kernel/configs/fragments")
	list, err := os.ReadFile(filepath.Join(dir, "whitelist.conf"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	b.mayLack = map[string]bool{}
	for name := range strings.FieldsSeq(string(list)) {
		b.mayLack[strings.TrimPrefix(name, "CONFIG_")] = true
	}
	var all []byte
	for _, sub := range []string{"common", b.arch.fragments} {
		files, err := filepath.Glob(filepath.Join(dir, sub, "*.conf"))
		if err != nil {
			return nil, err
		}
		if len(files) == 0 {
			return nil, errcode.KernelBase.Errorf("there are no sources of Kata in %s: it has no %s/*.conf", b.KataSource, filepath.Join(dir, sub))
		}
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err != nil {
				return nil, err
			}
			if sub == "common" && bytes.Contains(text, []byte(b.fragmentsOfOtherArch)) {
				continue
			}
			all = append(all, withLast(text)...)
		}
	}
	return all, nil
}

// compare checks that each option that CRIU needs has made it into the
// configuration, and returns those of Kata's that have not.
func (b *build) compare() (dropped []string, err error) {
	data, err := os.ReadFile(filepath.Join(b.objects, configName))
	if err != nil {
		return nil, err
	}
	have := options(data)
	var missing []string
	for _, o := range check.KernelOptions {
		if have[o] != "y" && (o != "MEM_SOFT_DIRTY" || !b.needsNoMemSoftDirty) {
			missing = append(missing, "CONFIG_"+o)
		}
	}
	if len(missing) > 0 {
		return nil, errcode.KernelImpossible.Errorf("%s cannot have %s=y with Kata's configuration: take other kernel sources with --source", b.Source, strings.Join(missing, ", "))
	}
	for name, value := range b.base {
		if value == "y" && have[name] != "y" && !b.mayLack[name] {
			dropped = append(dropped, "CONFIG_"+name)
		}
	}
	slices.Sort(dropped)
	return dropped, nil
}

// options reads the options that are set, by their names without prefix; later
// lines override earlier ones.
func options(config []byte) map[string]string {
	all := map[string]string{}
	lines := bufio.NewScanner(bytes.NewReader(config))
	for lines.Scan() {
		line := strings.TrimSpace(lines.Text())
		if name, ok := strings.CutSuffix(line, " is not set"); ok {
			delete(all, strings.TrimPrefix(name, "# CONFIG_"))
			continue
		}
		name, value, ok := strings.Cut(line, "=")
		if option, is := strings.CutPrefix(name, "CONFIG_"); ok && is {
			all[option] = value
		}
	}
	return all
}

// install copies a file, which replaces another as a whole.
func install(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	next := to + ".new"
	out, err := os.OpenFile(next, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	if err == nil {
		err = out.Sync()
	}
	if closed := out.Close(); err == nil {
		err = closed
	}
	if err != nil {
		_ = os.Remove(next)
		return err
	}
	return os.Rename(next, to)
}

// lastLines keeps the end of what is written to it.
type lastLines struct{ text []byte }

func (l *lastLines) Write(p []byte) (int, error) {
	const keep = 2000
	l.text = append(l.text, p...)
	l.text = l.text[max(0, len(l.text)-keep):]
	return len(p), nil
}

// String is the last lines as one.
func (l *lastLines) String() string {
	lines := strings.Split(strings.TrimSpace(string(l.text)), "\n")
	return strings.Join(lines[max(0, len(lines)-3):], "; ")
}
