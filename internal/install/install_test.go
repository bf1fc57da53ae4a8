// SPDX-License-Identifier: Apache-2.0

package install

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/pelletier/go-toml/v2"

	"github.com/kata-checkpoint/kata-checkpoint/internal/check"
	"github.com/kata-checkpoint/kata-checkpoint/internal/config"
	"github.com/kata-checkpoint/kata-checkpoint/internal/guestinitrd"
	"github.com/kata-checkpoint/kata-checkpoint/internal/kataconfig"
)

// node is a node with containerd and Kata, and a release beside it.
type node struct {
	t    *testing.T
	root string
	o    *Options
	// shim is what Kata's shim prints of its version.
	shim string
}

const kataDir = "/opt/kata/share/defaults/kata-containers"

const kataConfiguration = `
[hypervisor.clh]
kernel = "/opt/kata/share/vmlinux-6.18"
shared_fs = "virtio-fs"
guest_hook_path = ""
[runtime]
sandbox_bind_mounts = ["/theirs"]
`

func newNode(t *testing.T) *node {
	n := &node{t: t, root: t.TempDir(), shim: `Kata Containers containerd shim (Golang): id: "io.containerd.kata.v2", version: 4.1.0`}
	n.write("/usr/local/bin/"+kataShim, "", 0o755)
	n.write(kataDir+"/configuration-clh.toml", kataConfiguration, 0o644)
	// As Kata installs it; the administrator's link is absolute.
	n.link("configuration-clh.toml", kataDir+"/configuration.toml")
	n.link(kataDir+"/configuration.toml", "/etc/kata-containers/configuration.toml")
	n.write("/opt/kata/share/vmlinux-6.18", "", 0o644)
	n.write("/opt/kata/share/config-6.18", kernelConfig(""), 0o644)
	n.write("/etc/containerd/config.toml", "version = 3\nimports = ['/etc/containerd/conf.d/*.toml']\n", 0o644)
	n.o = &Options{
		Root: n.root, Dir: DefaultDir, BinDir: DefaultBinDir, Config: config.DefaultPath,
		ContainerdConfig: DefaultContainerdConfig, NRIPlugins: DefaultNRIPlugins, Path: DefaultPath,
		Proc: t.TempDir(),
		ShimVersion: func(context.Context, string) (string, error) {
			return n.shim, nil
		},
	}
	n.mounts("self", "")
	n.release("v1", "one")
	return n
}

func kernelConfig(without string) string {
	var b strings.Builder
	for _, o := range check.KernelOptions {
		if o != without {
			fmt.Fprintf(&b, "CONFIG_%s=y\n", o)
		}
	}
	return b.String()
}

// release makes another release, whose programs have the given content.
func (n *node) release(version, text string) {
	n.t.Helper()
	dir := n.t.TempDir()
	n.o.Release, n.o.Version = dir, version
	for _, name := range []string{
		"bin/" + check.ShimName, "bin/" + cliName, "bin/" + nriName,
		"guest-bundle/bin/kata-checkpoint-agent", "guest-bundle/bin/criu", "guest-bundle/criu/bin/tar",
	} {
		writeTo(n.t, filepath.Join(dir, name), text+" \x00 "+name, 0o775)
	}
	writeTo(n.t, filepath.Join(dir, "guest-bundle/agent.json"), `{"vsock_port":10750}`, 0o664)
	if err := os.Link(filepath.Join(dir, "guest-bundle/bin/kata-checkpoint-agent"), filepath.Join(dir, "guest-bundle/bin/hook")); err != nil {
		n.t.Fatal(err)
	}
}

func writeTo(t *testing.T, path, text string, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

func (n *node) write(path, text string, mode os.FileMode) {
	n.t.Helper()
	writeTo(n.t, filepath.Join(n.root, path), text, mode)
}

func (n *node) link(target, path string) {
	n.t.Helper()
	at := filepath.Join(n.root, path)
	if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
		n.t.Fatal(err)
	}
	if err := os.Symlink(target, at); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) remove(path string) {
	n.t.Helper()
	if err := os.RemoveAll(filepath.Join(n.root, path)); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) read(path string) string {
	n.t.Helper()
	data, err := os.ReadFile(filepath.Join(n.root, path))
	if err != nil {
		n.t.Fatal(err)
	}
	return string(data)
}

// process makes a process with a mount of the host directory at root.
func (n *node) mounts(pid, root string) {
	n.t.Helper()
	line := ""
	if root != "" {
		line = "36 35 98:0 " + root + " /run/kata-containers/shared/x rw - ext4 /dev/root rw\n"
	}
	writeTo(n.t, filepath.Join(n.o.Proc, pid, "mountinfo"), line, 0o644)
}

func (n *node) process(pid, exe string, args ...string) {
	n.t.Helper()
	writeTo(n.t, filepath.Join(n.o.Proc, pid, "cmdline"), strings.Join(append([]string{exe}, args...), "\x00"), 0o644)
	if err := os.Symlink(exe, filepath.Join(n.o.Proc, pid, "exe")); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) plan() *Plan {
	n.t.Helper()
	p, err := Prepare(n.t.Context(), n.o)
	if err != nil {
		n.t.Fatal(err)
	}
	return p
}

func (n *node) install() *Plan {
	n.t.Helper()
	p := n.plan()
	if err := p.Apply(); err != nil {
		n.t.Fatal(err)
	}
	return p
}

func (n *node) uninstall() {
	n.t.Helper()
	p, err := PrepareRemoval(n.o, false)
	if err != nil {
		n.t.Fatal(err)
	}
	if err := p.Apply(); err != nil {
		n.t.Fatal(err)
	}
}

// state is all there is on the node: modes, content, and when it was written.
func (n *node) state() map[string]string {
	n.t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(n.root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		st, err := d.Info()
		if err != nil {
			return err
		}
		text := st.Mode().String()
		switch {
		case st.Mode().IsRegular():
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			text += " " + st.ModTime().String() + " " + string(data)
		case st.Mode()&fs.ModeSymlink != 0:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			text += " " + target
		}
		all[strings.TrimPrefix(path, n.root)] = text
		return nil
	})
	if err != nil {
		n.t.Fatal(err)
	}
	return all
}

func TestInstallTwiceAndUninstall(t *testing.T) {
	n := newNode(t)
	before := n.state()

	var diff strings.Builder
	if err := n.plan().Diff(&diff); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"+runtime_type = 'io.containerd.kata-checkpoint.v2'", "+++ b/etc/containerd/conf.d/kata-checkpoint.toml", "--- /dev/null",
		"+[hypervisor.clh]", "new file /usr/local/bin/" + check.ShimName, "new directory /opt/kata-checkpoint/releases/v1-",
	} {
		if !strings.Contains(strings.ReplaceAll(diff.String(), "+  runtime", "+runtime"), want) {
			t.Errorf("the diff lacks %q:\n%s", want, diff.String())
		}
	}
	if d := cmp.Diff(before, n.state()); d != "" {
		t.Fatalf("a plan has changed the node:\n%s", d)
	}

	p := n.install()
	if len(p.Todo) != 0 {
		t.Errorf("left to do: %v", p.Todo)
	}
	const mode = 0o755
	for path, want := range map[string]os.FileMode{
		"/usr/local/bin/" + check.ShimName: mode, "/usr/local/bin/kata-checkpoint": mode, "/opt/nri/plugins/90-kata-checkpoint": mode,
		"/etc/kata-checkpoint/config.toml": 0o644, "/etc/containerd/conf.d/kata-checkpoint.toml": 0o644,
		kataDir + "/config.d/50-kata-checkpoint.toml": 0o644, "/opt/kata-checkpoint/guest/bin/kata-checkpoint-agent": mode,
		"/opt/kata-checkpoint/guest/agent.json": 0o644,
	} {
		st, err := os.Stat(n.o.at(mustResolve(t, n.o, path)))
		if err != nil {
			t.Error(err)
		} else if st.Mode().Perm() != want {
			t.Errorf("%s has mode %v, want %v", path, st.Mode().Perm(), want)
		}
	}
	if link, err := os.Readlink(filepath.Join(n.root, "/usr/local/bin/criu")); err != nil || link != "/opt/kata-checkpoint/guest/bin/criu" {
		t.Errorf("criu: %q, %v", link, err)
	}
	// kata-agent runs no hook that is a symbolic link: hard links stay what they are.
	bundle := n.o.at(mustResolve(t, n.o, "/opt/kata-checkpoint/guest"))
	agent, err := os.Stat(filepath.Join(bundle, "bin/kata-checkpoint-agent"))
	if err != nil {
		t.Fatal(err)
	}
	if hook, err := os.Lstat(filepath.Join(bundle, "bin/hook")); err != nil || !os.SameFile(agent, hook) {
		t.Errorf("the hook is not the agent: %v", err)
	}

	installed := n.state()
	again := n.install()
	if !again.Empty() {
		t.Errorf("the second installation: %v", again.Summary())
	}
	if d := cmp.Diff(installed, n.state()); d != "" {
		t.Errorf("the second installation has changed:\n%s", d)
	}

	n.uninstall()
	if d := cmp.Diff(before, n.state()); d != "" {
		t.Errorf("uninstall has left (-) or changed:\n%s", d)
	}
	if _, err := PrepareRemoval(n.o, false); !errors.Is(err, ErrNotInstalled) {
		t.Errorf("a second uninstallation: %v", err)
	}
}

func mustResolve(t *testing.T, o *Options, path string) string {
	t.Helper()
	target, err := o.resolved(path)
	if err != nil {
		t.Fatal(err)
	}
	return target
}

// What is written is what our configuration, Kata and containerd read.
func TestWhatIsWritten(t *testing.T) {
	for name, c := range map[string]struct {
		shim  string
		hooks string
	}{
		"Go":   {`(Golang): version: 4.1.0`, "/run/kata-containers/shared/containers/sandbox-mounts/guest/hooks"},
		"Rust": {`(Rust): version: 4.1.0`, "/run/kata-containers/shared/containers/passthrough/sandbox-mounts/guest/hooks"},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			n.shim = c.shim
			shim, _ := kataconfig.ParseVersion(c.shim)
			base := kataDir
			if shim == kataconfig.Rust {
				base += "/runtime-rs"
				n.write(base+"/configuration.toml", kataConfiguration, 0o644)
				n.remove("/usr/local/bin/" + kataShim)
				n.write("/opt/kata/runtime-rs/bin/"+kataShim, "", 0o755)
			}
			n.install()
			loaded, err := kataconfig.Load(filepath.Join(n.root, base, "configuration.toml"), shim)
			if err != nil {
				t.Fatal(err)
			}
			want := []string{"/theirs", "/opt/kata-checkpoint/guest"}
			if loaded.GuestHookPath != c.hooks || !cmp.Equal(loaded.SandboxBindMounts, want) || loaded.Kernel != "/opt/kata/share/vmlinux-6.18" {
				t.Errorf("Kata reads %+v", loaded)
			}
			cfg, err := config.Load(filepath.Join(n.root, config.DefaultPath))
			if err != nil {
				t.Fatal(err)
			}
			if cfg.GuestBundle != "/opt/kata-checkpoint/guest" || cfg.KataConfigPath == "" {
				t.Errorf("our configuration is %+v", cfg)
			}
			if wantShim := map[kataconfig.Shim]string{kataconfig.Go: kataShim, kataconfig.Rust: "/opt/kata/runtime-rs/bin/" + kataShim}[shim]; cfg.DownstreamShim != wantShim {
				t.Errorf("downstream_shim is %s, want %s", cfg.DownstreamShim, wantShim)
			}
		})
	}
}

func TestContainerd(t *testing.T) {
	for name, c := range map[string]struct {
		main string // empty: no file
		// where the drop-in is, its version and table.
		path    string
		version int64
		plugin  string
		todo    string
	}{
		"none":           {"", "/etc/containerd/conf.d", 3, criPlugin3, ""},
		"version 2":      {"version = 2\nimports = ['/etc/containerd/conf.d/*.toml']\n", "/etc/containerd/conf.d", 2, criPlugin2, ""},
		"version 4":      {"version = 4\nimports = ['conf.d/*.toml']\n", "/etc/containerd/conf.d", 4, criPlugin3, ""},
		"another folder": {"version = 3\nimports = ['/etc/cri/*.toml', '/x.toml']\n", "/etc/cri", 3, criPlugin3, ""},
		"no imports":     {"version = 3\n", "/etc/containerd/conf.d", 3, criPlugin3, `imports = ["/etc/containerd/conf.d/*.toml"]`},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			n.remove("/etc/containerd")
			if c.main != "" {
				n.write("/etc/containerd/config.toml", c.main, 0o644)
			}
			before := n.state()
			p := n.install()
			if todo := strings.Join(p.Todo, "; "); !strings.Contains(todo, c.todo) || (todo == "") != (c.todo == "") {
				t.Errorf("left to do: %q, want %q", todo, c.todo)
			}
			var dropIn struct {
				Version int64          `toml:"version"`
				Plugins map[string]any `toml:"plugins"`
			}
			if err := toml.Unmarshal([]byte(n.read(c.path+"/kata-checkpoint.toml")), &dropIn); err != nil {
				t.Fatal(err)
			}
			if dropIn.Version != c.version || dropIn.Plugins[c.plugin] == nil {
				t.Errorf("the drop-in is %+v", dropIn)
			}
			if c.main != "" && n.read("/etc/containerd/config.toml") != c.main {
				t.Error("containerd's own configuration was changed")
			}
			if again := n.plan(); !again.Empty() {
				t.Errorf("a second installation: %v", again.Summary())
			}
			n.uninstall()
			if d := cmp.Diff(before, n.state()); d != "" {
				t.Errorf("uninstall has left:\n%s", d)
			}
		})
	}
}

// Nothing happens where something is in the way, and it is named.
func TestRefusals(t *testing.T) {
	for name, c := range map[string]struct {
		fault func(*node)
		words []string
	}{
		"a file of somebody else's": {
			func(n *node) { n.write("/etc/containerd/conf.d/kata-checkpoint.toml", "# mine\n", 0o644) },
			[]string{"/etc/containerd/conf.d/kata-checkpoint.toml exists", "move it away"},
		},
		"a guest bundle of make install": {
			func(n *node) { n.write("/opt/kata-checkpoint/guest/agent.json", "", 0o644) },
			[]string{"/opt/kata-checkpoint/guest exists"},
		},
		"no Kata":           {func(n *node) { n.remove("/usr/local/bin/" + kataShim) }, []string{"install Kata Containers 4.1", "--kata-shim"}},
		"no configuration":  {func(n *node) { n.remove(kataDir); n.remove("/etc/kata-containers") }, []string{"--kata-config"}},
		"hooks of its own":  {func(n *node) { n.write(kataDir+"/config.d/10.toml", "[hypervisor.clh]\nguest_hook_path='/h'\n", 0o644) }, []string{"guest_hook_path", "/h"}},
		"another shared_fs": {func(n *node) { n.write(kataDir+"/config.d/10.toml", "[hypervisor.clh]\nshared_fs='none'\n", 0o644) }, []string{"shared_fs", "none"}},
		"an old containerd": {func(n *node) { n.write("/etc/containerd/config.toml", "imports = []\n", 0o644) }, []string{"version 0", "containerd config migrate"}},
		"no release":        {func(n *node) { n.o.Release = n.root }, []string{"no release", "--from"}},
		"a kernel unfit": {func(n *node) {
			n.write("/k", "", 0o644)
			n.write("/k.config", kernelConfig("UNIX_DIAG"), 0o644)
			n.o.Kernel = "/k"
		}, []string{"/k lacks UNIX_DIAG", "guest-kernel"}},
		"a record in pieces": {func(n *node) { n.write("/opt/kata-checkpoint/install.json", "{", 0o644) }, []string{"install.json"}},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			c.fault(n)
			before := n.state()
			_, err := Prepare(t.Context(), n.o)
			if err == nil {
				t.Fatal("accepted")
			}
			for _, w := range c.words {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("the error lacks %q: %v", w, err)
				}
			}
			if d := cmp.Diff(before, n.state()); d != "" {
				t.Errorf("changed:\n%s", d)
			}
		})
	}
}

func TestKernel(t *testing.T) {
	n := newNode(t)
	n.write("/opt/kata/share/config-6.18", kernelConfig("CHECKPOINT_RESTORE"), 0o644)
	p := n.install()
	if len(p.Todo) != 1 || !strings.Contains(p.Todo[0], "kata-checkpoint guest-kernel") || !strings.Contains(p.Todo[0], "lacks CHECKPOINT_RESTORE") {
		t.Errorf("left to do: %v", p.Todo)
	}
	n.write("/opt/kata-checkpoint/"+KernelName, "", 0o644)
	n.write("/opt/kata-checkpoint/"+KernelName+".config", kernelConfig(""), 0o644)
	if p := n.install(); len(p.Todo) != 0 {
		t.Errorf("left to do: %v", p.Todo)
	}
	if text := n.read(kataDir + "/config.d/" + dropInName); !strings.Contains(text, `kernel = "/opt/kata-checkpoint/share/vmlinux-kata-checkpoint"`) {
		t.Errorf("the drop-in is %s", text)
	}
}

// Where the guests have the agent in their initrd, their hook and their mounts stay
// as they are.
func TestAgentInInitrd(t *testing.T) {
	n := newNode(t)
	n.write(kataDir+"/config.d/60-initrd.toml", "[hypervisor.clh]\nimage = \"\"\ninitrd = \"/i\"\nguest_hook_path = \"/opt/kata-checkpoint/guest/hooks\"\n", 0o644)
	p := n.plan()
	due := func() bool {
		return strings.Contains(strings.Join(n.plan().Todo, "\n"), "run kata-checkpoint guest-initrd")
	}
	if !due() {
		t.Errorf("nothing is said of an initrd without the agent: %v", p.Todo)
	}
	if err := p.Apply(); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{
		"bin/kata-checkpoint-agent", "bin/kata-checkpoint-helper", "bin/kata-checkpoint-launcher", "criu/bin/criu", "criu/bin/tar", "criu/bin/gzip",
		"hooks/prestart/kata-checkpoint-agent-hook",
	} {
		n.write("/bundle/"+name, "", 0o755)
	}
	n.write("/kata.img", "070701", 0o644)
	if _, err := guestinitrd.Append(&guestinitrd.Options{
		Base: filepath.Join(n.root, "kata.img"), Bundle: filepath.Join(n.root, "bundle"), Version: n.o.Version, Out: filepath.Join(n.root, "i"),
	}); err != nil {
		t.Fatal(err)
	}
	if due() {
		t.Error("the initrd has the agent")
	}
	text := n.read(kataDir + "/config.d/" + dropInName)
	if !strings.Contains(text, "[hypervisor.clh]\n") || strings.Contains(text, "guest_hook_path") || strings.Contains(text, "sandbox_bind_mounts") {
		t.Errorf("the drop-in is %s", text)
	}
	loaded, err := kataconfig.Load(filepath.Join(n.root, kataDir, "configuration-clh.toml"), kataconfig.Go)
	if err != nil || loaded.GuestHookPath != "/opt/kata-checkpoint/guest/hooks" || loaded.Initrd != "/i" {
		t.Errorf("Kata reads %+v, %v", loaded, err)
	}
}

func TestNoKernel(t *testing.T) {
	n := newNode(t)
	n.write(kataDir+"/config.d/10.toml", "[hypervisor.clh]\nkernel = ''\n", 0o644)
	if p := n.install(); len(p.Todo) != 1 || !strings.Contains(p.Todo[0], "give Kata a guest kernel") {
		t.Errorf("left to do: %v, notes: %v", p.Todo, p.Notes)
	}
}

// A drop-in beside configurations of several hypervisors would break the others.
func TestNeighbours(t *testing.T) {
	n := newNode(t)
	n.write(kataDir+"/configuration-qemu.toml", strings.ReplaceAll(kataConfiguration, "clh", "qemu"), 0o644)
	n.write(kataDir+"/config.d/10-site.toml", "[hypervisor.clh]\ndefault_memory = 512\n", 0o644)
	before := n.state()
	n.install()
	const own = "/etc/kata-checkpoint/kata/configuration-clh.toml"
	if n.read(own) != kataConfiguration || !strings.Contains(n.read("/etc/kata-checkpoint/kata/config.d/10-site.toml"), "512") {
		t.Error("the copy differs")
	}
	loaded, err := kataconfig.Load(filepath.Join(n.root, own), kataconfig.Go)
	if err != nil || loaded.GuestHookPath == "" {
		t.Errorf("Kata reads %+v, %v", loaded, err)
	}
	for _, path := range []string{"/etc/kata-checkpoint/config.toml", "/etc/containerd/conf.d/kata-checkpoint.toml"} {
		if !strings.Contains(n.read(path), own) {
			t.Errorf("%s does not name %s", path, own)
		}
	}
	if p := n.plan(); !p.Empty() {
		t.Errorf("a second installation: %v", p.Summary())
	}
	// Kata is upgraded.
	n.write(kataDir+"/configuration-clh.toml", kataConfiguration+"# newer\n", 0o644)
	n.install()
	if !strings.HasSuffix(n.read(own), "# newer\n") {
		t.Error("the copy is old")
	}
	n.write(kataDir+"/configuration-clh.toml", kataConfiguration, 0o644)
	n.uninstall()
	after := n.state()
	delete(before, kataDir+"/configuration-clh.toml") // its time
	delete(after, kataDir+"/configuration-clh.toml")
	if d := cmp.Diff(before, after); d != "" {
		t.Errorf("uninstall has left:\n%s", d)
	}
}

// An operator's configuration is respected.
func TestOwnConfigurationStays(t *testing.T) {
	n := newNode(t)
	const text = "guest_bundle = \"/srv/bundle\"\n"
	n.write(config.DefaultPath, text, 0o600)
	n.install()
	if n.read(config.DefaultPath) != text {
		t.Error("it was changed")
	}
	if !strings.Contains(n.read(kataDir+"/config.d/"+dropInName), `"/srv/bundle"`) {
		t.Error("Kata does not share the bundle")
	}
	if link, err := os.Readlink(filepath.Join(n.root, "/srv/bundle")); err != nil || !strings.HasPrefix(link, "/opt/kata-checkpoint/releases/v1-") || filepath.Base(link) != "bundle" {
		t.Errorf("/srv/bundle: %q, %v", link, err)
	}
	n.uninstall()
	if n.read(config.DefaultPath) != text {
		t.Error("it was changed by uninstall")
	}
}

// What an operator has changed since stays, and uninstall names it.
func TestChangedSince(t *testing.T) {
	n := newNode(t)
	n.install()
	const path = "/etc/containerd/conf.d/kata-checkpoint.toml"
	text := n.read(path) + "# mine\n"
	n.write(path, text, 0o644)
	n.release("v2", "two")
	p := n.install()
	if n.read(path) != text || !strings.Contains(strings.Join(p.Notes, "\n"), path+" was changed") {
		t.Errorf("notes: %v", p.Notes)
	}
	if _, err := PrepareRemoval(n.o, false); err == nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "--remove-changed") {
		t.Errorf("uninstall: %v", err)
	}
	removal, err := PrepareRemoval(n.o, true)
	if err != nil {
		t.Fatal(err)
	}
	if err := removal.Apply(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(n.root, path)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s: %v", path, err)
	}
}

// An upgrade replaces files as a whole, and leaves running VMs their bundle.
func TestUpgradeWhileRunning(t *testing.T) {
	n := newNode(t)
	n.install()
	first := mustResolve(t, n.o, "/opt/kata-checkpoint/guest")
	shim, err := os.Open(filepath.Join(n.root, "/usr/local/bin", check.ShimName))
	if err != nil {
		t.Fatal(err)
	}
	defer shim.Close()
	n.process("7", "/usr/local/bin/"+check.ShimName, "-namespace", "k8s.io", "-id", "pod1")
	n.mounts("7", "/@subvolume"+first)

	n.release("v2", "two")
	p := n.install()
	second := mustResolve(t, n.o, "/opt/kata-checkpoint/guest")
	if second == first {
		t.Error("the bundle is the same")
	}
	if _, err := os.Stat(filepath.Join(n.root, first, "bin/criu")); err != nil || !strings.Contains(strings.Join(p.Notes, "\n"), first+" stays") {
		t.Errorf("the running VM's bundle: %v; notes: %v", err, p.Notes)
	}
	old := make([]byte, 3)
	if _, err := shim.ReadAt(old, 0); err != nil || string(old) != "one" {
		t.Errorf("the running shim's file has %q, %v", old, err)
	}
	if text := n.read("/usr/local/bin/" + check.ShimName); !strings.HasPrefix(text, "two") {
		t.Errorf("the shim is %q", text)
	}
	if _, err := PrepareRemoval(n.o, true); err == nil || !strings.Contains(err.Error(), "pod1") {
		t.Errorf("uninstall while a sandbox runs: %v", err)
	}

	// The sandbox has ended.
	if err := os.RemoveAll(filepath.Join(n.o.Proc, "7")); err != nil {
		t.Fatal(err)
	}
	n.install()
	if _, err := os.Stat(filepath.Join(n.root, filepath.Dir(first))); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the old bundle is still there: %v", err)
	}
	n.uninstall()
}

// An upgrade needs none of the flags with which the first release was installed.
func TestUpgradeRemembers(t *testing.T) {
	n := newNode(t)
	first := *n.o
	n.write("/srv/kata/configuration-clh.toml", kataConfiguration, 0o644)
	n.o.KataConfig, n.o.NRIPlugins = "/srv/kata/configuration-clh.toml", ""
	n.install()
	*n.o = first
	n.release("v2", "two")
	n.o.Given = func(string) bool { return false }
	n.install()
	if _, err := os.Stat(filepath.Join(n.root, "/srv/kata/config.d", dropInName)); err != nil {
		t.Errorf("Kata's configuration was forgotten: %v", err)
	}
	if _, err := os.Stat(filepath.Join(n.root, "/opt/nri")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("that no NRI plugin is wanted was forgotten: %v", err)
	}
	n.o.KataConfig = kataDir + "/configuration.toml"
	n.o.Given = func(flag string) bool { return flag == "kata-config" }
	n.install()
	if _, err := os.Stat(filepath.Join(n.root, kataDir, "config.d", dropInName)); err != nil {
		t.Errorf("a flag was not heeded: %v", err)
	}
	if _, err := os.Stat(filepath.Join(n.root, "/srv/kata/config.d", dropInName)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the old drop-in is still there: %v", err)
	}
	n.uninstall()
	if _, err := os.Stat(filepath.Join(n.root, "/srv/kata/config.d")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the directory of the old drop-in is still there: %v", err)
	}
}

// Other installations of the shim on the machine do not count.
func TestOtherShims(t *testing.T) {
	n := newNode(t)
	n.install()
	n.process("7", "/opt/other/bin/"+check.ShimName, "-id", "x")
	n.mounts("7", "")
	n.process("8", "/usr/bin/containerd-shim-runc-v2", "-id", "y")
	n.mounts("8", "")
	n.uninstall()
}

// An installation that ended in the middle is completed by the next one.
func TestInterrupted(t *testing.T) {
	n := newNode(t)
	n.install()
	n.release("v2", "two")
	p := n.plan()
	if err := p.intend(); err != nil {
		t.Fatal(err)
	}
	if err := p.carryOut(&p.changes[len(p.changes)-1]); err != nil {
		t.Fatal(err)
	}
	n.install()
	if text := n.read("/usr/local/bin/" + check.ShimName); !strings.HasPrefix(text, "two") {
		t.Errorf("the shim is %q", text)
	}
	if p := n.plan(); !p.Empty() || len(p.Notes) != 0 {
		t.Errorf("a second installation: %v, %v", p.Summary(), p.Notes)
	}
	n.uninstall()
}

// An installation that did not come to restart containerd is noticed by the next
// one.
func TestRestartDue(t *testing.T) {
	n := newNode(t)
	if n.o.RestartDue() {
		t.Error("with nothing installed")
	}
	n.install()
	n.process("9", "/usr/bin/containerd", "--config", "x")
	for boot, want := range map[int64]bool{time.Now().Add(-time.Hour).Unix(): true, time.Now().Add(time.Hour).Unix(): false} {
		writeTo(t, filepath.Join(n.o.Proc, "stat"), fmt.Sprintf("btime %d\n", boot), 0o644)
		writeTo(t, filepath.Join(n.o.Proc, "9/stat"), "9 (containerd) S 1 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 100 0", 0o644)
		if got := n.o.RestartDue(); got != want {
			t.Errorf("a containerd that started at %d: %v", boot+1, got)
		}
	}
}

// The command is not installed twice where a package has done it.
func TestPackagedCommand(t *testing.T) {
	n := newNode(t)
	n.write("/usr/bin/kata-checkpoint", "", 0o755)
	n.install()
	if _, err := os.Stat(filepath.Join(n.root, "/usr/local/bin/kata-checkpoint")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a second one: %v", err)
	}
}

func TestRuntimeClass(t *testing.T) {
	n := newNode(t)
	if text := n.plan().RuntimeClass; !regexp.MustCompile(`(?m)^handler: ` + Handler + `$`).MatchString(text) {
		t.Errorf("the RuntimeClass is %s", text)
	}
}
