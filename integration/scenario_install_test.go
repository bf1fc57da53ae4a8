// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/parts"
	"github.com/kata-checkpoint/kata-checkpoint/integration/testbed"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// installTwiceAndUninstall: on a node with containerd and Kata and nothing of
// ours, the command installs all that a checkpoint and a restore in another VM
// need. A second time it changes nothing, and uninstall leaves the node as it
// was.
func installTwiceAndUninstall(s *scenario) {
	n := s.bareNode()
	before := n.tree()
	dry := n.install("--dry-run")
	for _, want := range []string{"+++ b" + n.bed.ConfD() + "/kata-checkpoint.toml", "+guest_hook_path", "containerd-shim-kata-checkpoint-v2"} {
		if !strings.Contains(dry, want) {
			s.Errorf("the dry run lacks %q: %s", want, dry)
		}
	}
	if d := cmp.Diff(before, n.tree()); d != "" {
		s.Errorf("a dry run has changed the node:\n%s", d)
	}
	if out := n.install(); !strings.Contains(out, "kind: RuntimeClass") {
		s.Errorf("install prints no RuntimeClass: %s", out)
	}
	installed := n.tree()
	if out := n.install(); !strings.Contains(out, "nothing to do") {
		s.Errorf("a second installation: %s", out)
	}
	if d := cmp.Diff(installed, n.tree()); d != "" {
		s.Errorf("a second installation has changed the node:\n%s", d)
	}
	s.step("installed")

	n.restartContainerd()
	n.check()
	c := s.create(counter("c"))
	first := s.run(c)
	s.waitNumbers(first.Output, workload.Ticks, 3)
	dir := s.checkpoint(first, true)
	s.waitExit(first, 137)
	ticks := s.printedNumbers(first.Output, workload.Ticks)
	restored := s.restore(c, dir)
	s.checkConsecutive(1, append(ticks, s.waitNumbers(restored.Output, workload.Ticks, 3)...))
	s.checkOtherVM(first, restored)

	out, err := n.command("uninstall", n.paths()...)
	if err == nil || !strings.Contains(out, c.ID()) {
		s.Errorf("uninstall with a container: %v, %s", err, out)
	}
	if d := cmp.Diff(installed, n.tree()); d != "" {
		s.Errorf("an uninstallation that was refused has changed the node:\n%s", d)
	}
	s.remove(c)
	n.waitNoShim()
	n.uninstall()
	if d := cmp.Diff(before, n.tree()); d != "" {
		s.Errorf("uninstall has left, or changed:\n%s", d)
	}
	n.restartContainerd()
	s.step("uninstalled")
}

// upgradeRunning: another release is installed while a container runs that has
// never been checkpointed. It is checkpointed afterwards, by the shim and the
// agent with which it was started, and continues with those of the new release.
func upgradeRunning(s *scenario) {
	n := s.bareNode()
	n.install()
	n.restartContainerd()
	c := s.create(counter("c"))
	first := s.run(c)
	s.waitNumbers(first.Output, workload.Ticks, 3)
	old, err := filepath.EvalSymlinks(n.bundle())
	s.check(err)

	n.newRelease()
	out := n.install()
	if !strings.Contains(out, old+" stays") {
		s.Errorf("nothing is said about the bundle of the running VM: %s", out)
	}
	now, err := filepath.EvalSymlinks(n.bundle())
	s.check(err)
	if now == old {
		s.Error("the guest bundle is still that of the old release")
	}
	s.step("upgraded")

	other := s.run(s.create(counter("other")))
	s.waitNumbers(other.Output, workload.Ticks, 2)
	s.checkpoint(first, false)
	s.checkKeepsRunning(first)
	dir := s.checkpoint(first, true)
	s.waitExit(first, 137)
	ticks := s.printedNumbers(first.Output, workload.Ticks)
	restored := s.restore(c, dir)
	s.checkConsecutive(1, append(ticks, s.waitNumbers(restored.Output, workload.Ticks, 3)...))
	s.step("checkpointed by the old release, restored by the new one")

	n.install()
	if _, err := os.Stat(old); !errors.Is(err, fs.ErrNotExist) {
		s.Errorf("the old guest bundle is still there: %v", err)
	}
	s.remove(c)
	for _, id := range s.ids {
		s.check(s.engine.Remove(s.ctx, id))
	}
	n.waitNoShim()
	n.uninstall()
}

// debInstallRemove: the .deb is unpacked by dpkg below a directory, its command
// installs it on a node, a container is checkpointed and restored, and nothing
// is left once it is removed.
func debInstallRemove(s *scenario) {
	n := s.bareNode()
	packages, err := filepath.Glob(n.parts.Build("packages/*.deb"))
	s.check(err)
	if len(packages) != 1 {
		s.Skip("there is no package: make packages")
	}
	root := filepath.Join(n.bed.Dir, "deb")
	s.check(os.MkdirAll(filepath.Join(root, "var/lib/dpkg/updates"), 0o755))
	for _, name := range []string{"status", "available"} {
		s.check(os.WriteFile(filepath.Join(root, "var/lib/dpkg", name), nil, 0o644))
	}
	dpkg := func(args ...string) {
		s.Helper()
		out, err := exec.CommandContext(s.ctx, "dpkg", append([]string{"--root=" + root, "--force-script-chrootless", "--log=/dev/null"}, args...)...).CombinedOutput()
		if err != nil {
			s.Fatalf("dpkg %v: %v: %s", args, err, out)
		}
	}
	before := n.tree()
	dpkg("--install", packages[0])
	n.program, n.release = filepath.Join(root, "usr/bin/kata-checkpoint"), ""
	n.install()
	n.restartContainerd()
	s.step("installed")
	c := s.create(counter("c"))
	first := s.run(c)
	s.waitNumbers(first.Output, workload.Ticks, 3)
	dir := s.checkpoint(first, true)
	s.waitExit(first, 137)
	ticks := s.printedNumbers(first.Output, workload.Ticks)
	restored := s.restore(c, dir)
	s.checkConsecutive(1, append(ticks, s.waitNumbers(restored.Output, workload.Ticks, 3)...))
	s.remove(c)
	n.waitNoShim()
	n.uninstall()
	dpkg("--purge", "kata-checkpoint")
	after := n.tree()
	for _, tree := range []map[string]string{before, after} {
		maps.DeleteFunc(tree, func(name, _ string) bool { return strings.HasPrefix(name, "/deb/var") }) // dpkg's own
	}
	if d := cmp.Diff(before, after); d != "" {
		s.Errorf("the package has left, or changed:\n%s", d)
	}
	n.restartContainerd()
}

// TestPreRemove: a package is not removed while what it has installed cannot be.
func TestPreRemove(t *testing.T) {
	root := t.TempDir()
	for path, text := range map[string]string{
		"opt/kata-checkpoint/install.json": "{}", "usr/bin/kata-checkpoint": "#!/bin/sh\necho \"$@\" >>" + root + "/log\nexit 1\n",
	} {
		if err := errors.Join(os.MkdirAll(filepath.Dir(filepath.Join(root, path)), 0o755), os.WriteFile(filepath.Join(root, path), []byte(text), 0o755)); err != nil {
			t.Fatal(err)
		}
	}
	run := func(arg string) error {
		cmd := exec.CommandContext(t.Context(), "sh", "../packaging/scripts/preremove", arg)
		cmd.Env = append(os.Environ(), "DPKG_ROOT="+root)
		return cmd.Run()
	}
	for _, arg := range []string{"upgrade", "1"} {
		if err := run(arg); err != nil {
			t.Errorf("%s: %v", arg, err)
		}
	}
	for _, arg := range []string{"remove", "0"} {
		if err := run(arg); err == nil {
			t.Errorf("%s: the package is removed", arg)
		}
	}
	if err := os.Remove(filepath.Join(root, "opt/kata-checkpoint/install.json")); err != nil {
		t.Fatal(err)
	}
	if err := run("remove"); err != nil {
		t.Errorf("with nothing installed: %v", err)
	}
	want := strings.Repeat("uninstall --root "+root+"/\n", 2)
	if log, err := os.ReadFile(filepath.Join(root, "log")); err != nil || string(log) != want {
		t.Errorf("the command was called with %q, %v", log, err)
	}
}

// bareNode is a testbed of the scenario's own, with nothing of ours, and a
// release that can be installed there.
type bareNode struct {
	s       *scenario
	bed     *testbed.Testbed
	parts   *parts.Parts
	program string // the command
	release string // empty: the command's own
}

// bareNode starts a bare testbed. Until the scenario's end its containers are
// made there.
func (s *scenario) bareNode() *bareNode {
	s.Helper()
	p, err := parts.Find()
	s.check(err)
	dir, err := os.MkdirTemp("/var/tmp", "kata-checkpoint-bare-")
	s.check(err)
	bed, err := testbed.Up(s.ctx, testbed.Options{Dir: dir, Kata: s.testbed.Kata, Way: s.testbed.Way, Bare: true})
	s.check(err)
	c, err := bed.Client()
	s.check(err)
	shared, events := s.testbed, s.events
	s.engine = &engine.Engine{Client: c, Runtime: testbed.Runtime, FIFOs: filepath.Join(bed.Dir, "tmp/fifos")}
	s.testbed = &sharedTestbed{Testbed: bed, engine: s.engine}
	s.events = s.engine.Watch(s.ctx)
	s.afterContainers(func() error {
		err := errors.Join(s.events.Close(), s.engine.Client.Close())
		s.testbed, s.engine, s.events = shared, shared.engine, events
		ctx, cancel := context.WithTimeout(context.Background(), paced(cleanUpTimeout))
		defer cancel()
		return errors.Join(err, bed.Down(ctx))
	})
	image, err := p.WorkloadImage(s.ctx, p.Bin("workload"), workload.Path)
	s.check(err)
	s.check(bed.Import(s.ctx, image))
	n := &bareNode{s: s, bed: bed, parts: p, program: p.Bin("kata-checkpoint"), release: s.newDir()}
	s.check(os.Symlink(p.Bin(), filepath.Join(n.release, "bin")))
	s.check(os.Symlink(p.Build("guest-bundle"), filepath.Join(n.release, "guest-bundle")))
	s.step("a node with nothing of ours")
	return n
}

// newRelease makes the release another one: its guest bundle differs.
func (n *bareNode) newRelease() {
	n.s.Helper()
	n.release = n.s.newDir()
	n.s.check(os.Symlink(n.parts.Bin(), filepath.Join(n.release, "bin")))
	bundle := filepath.Join(n.release, "guest-bundle")
	n.s.check(os.CopyFS(bundle, os.DirFS(n.parts.Build("guest-bundle"))))
	n.s.check(os.WriteFile(filepath.Join(bundle, "RELEASE"), []byte("another\n"), 0o644))
}

// bundle is where the operator's configuration wants the guest bundle.
func (n *bareNode) bundle() string { return filepath.Join(n.bed.Dir, "bundle") }

// paths are the flags for the testbed's directory in place of /.
func (n *bareNode) paths() []string {
	return []string{"--dir", filepath.Join(n.bed.Dir, "opt"), "--bin-dir", n.bed.HostPrograms(), "--config", n.bed.OwnConfig()}
}

func (n *bareNode) command(name string, args ...string) (string, error) {
	cmd := exec.CommandContext(n.s.ctx, n.program, append([]string{name}, args...)...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (n *bareNode) install(args ...string) string {
	n.s.Helper()
	args = slices.Concat(n.paths(), []string{
		"--containerd-config", n.bed.ContainerdConfig(), "--containerd-path", n.bed.Path,
		"--kata-shim", n.bed.Downstream, "--kata-config", n.bed.KataConfig(), "--nri-plugins", filepath.Join(n.bed.Dir, "nri"),
	}, args)
	if n.release != "" {
		args = append(args, "--from", n.release)
	}
	out, err := n.command("install", args...)
	if err != nil {
		n.s.Fatalf("install: %v: %s", err, out)
	}
	return out
}

func (n *bareNode) uninstall() {
	n.s.Helper()
	if out, err := n.command("uninstall", n.paths()...); err != nil {
		n.s.Fatalf("uninstall: %v: %s", err, out)
	}
}

// check looks at the node as an operator does.
func (n *bareNode) check() {
	n.s.Helper()
	findings, _ := n.s.checkCommand() // the status says what the findings say
	for _, f := range findings {
		if f.Level == "error" || f.Level == "warning" && f.Check != "kata.kernel" {
			n.s.Errorf("%s %s: %s (%s)", f.Level, f.Check, f.Text, f.Cure)
		}
	}
}

func (n *bareNode) restartContainerd() {
	n.s.Helper()
	n.s.check(n.bed.KillContainerd(n.s.ctx))
	n.s.startContainerd()
}

// waitNoShim waits until the last of our shims has ended, which it does after
// its last container.
func (n *bareNode) waitNoShim() {
	n.s.Helper()
	var out string
	if !n.s.eventually(settleTimeout, func() bool {
		var err error
		out, err = n.command("uninstall", append(n.paths(), "--dry-run")...)
		return err == nil
	}) {
		n.s.Fatalf("uninstall is refused: %s", out)
	}
}

// tree is all that install could have changed: the type, mode and content of
// each file of the testbed, without what its programs write while they run.
func (n *bareNode) tree() map[string]string {
	n.s.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(n.bed.Dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(path, n.bed.Dir)
		if d.IsDir() && slices.Contains([]string{"/run", "/root", "/log", "/state", "/tmp", "/stop"}, name) {
			return filepath.SkipDir
		}
		if name == "/testbed.json" || name == "" {
			return nil
		}
		st, err := d.Info()
		if err != nil {
			return err
		}
		all[name] = st.Mode().String()
		switch {
		case st.Mode().IsRegular():
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			all[name] += fmt.Sprintf(" %v %x", st.ModTime(), sha256.Sum256(data))
		case st.Mode()&fs.ModeSymlink != 0:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			all[name] += " " + target
		}
		return nil
	})
	n.s.check(err)
	return all
}

// TestContainerdReadsTheDropIn: each release of containerd reads the drop-in
// beside a main configuration of each version that it takes.
func TestContainerdReadsTheDropIn(t *testing.T) {
	p, err := parts.Find()
	if err != nil {
		t.Fatal(err)
	}
	older := parts.OlderContainerds
	if core {
		older = older[:1] // which a scenario of the core set builds as well
	}
	for _, release := range append([]string{parts.ContainerdVersion}, older...) {
		versions := []string{"", "2", "3"}
		if !strings.HasPrefix(release, "2.1") && !strings.HasPrefix(release, "2.2") {
			versions = append(versions, "4")
		}
		programs, err := p.Containerd(t.Context(), release)
		if err != nil {
			t.Fatal(err)
		}
		for _, version := range versions {
			t.Run(release+" with version "+version, func(t *testing.T) {
				dir := t.TempDir()
				main := filepath.Join(dir, "containerd/config.toml")
				if err := os.MkdirAll(filepath.Dir(main), 0o755); err != nil {
					t.Fatal(err)
				}
				if version != "" {
					text := "version = " + version + "\nimports = ['" + dir + "/containerd/conf.d/*.toml']\n"
					if err := os.WriteFile(main, []byte(text), 0o600); err != nil {
						t.Fatal(err)
					}
				}
				kata, shim, rel := filepath.Join(dir, "kata.toml"), filepath.Join(dir, "containerd-shim-kata-v2"), filepath.Join(dir, "release")
				for path, text := range map[string]string{
					kata: "[hypervisor.clh]\nshared_fs = 'virtio-fs'\n", shim: "#!/bin/sh\necho '(Golang): version: 4.1.0'\n",
				} {
					if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
						t.Fatal(err)
					}
				}
				for name, target := range map[string]string{"bin": p.Bin(), "guest-bundle": p.Build("guest-bundle")} {
					if err := errors.Join(os.MkdirAll(rel, 0o755), os.Symlink(target, filepath.Join(rel, name))); err != nil {
						t.Fatal(err)
					}
				}
				out, err := exec.CommandContext(t.Context(), p.Bin("kata-checkpoint"), "install", "--from", rel, "--dir", dir+"/opt", "--bin-dir", dir+"/bin",
					"--containerd-path", dir+"/bin", "--config", dir+"/etc/config.toml", "--containerd-config", main, "--kata-shim", shim, "--kata-config", kata,
					"--nri-plugins", "").CombinedOutput()
				var exit *exec.ExitError
				if err != nil && (!errors.As(err, &exit) || exit.ExitCode() != 1) { // Kata's kernel is left to do
					t.Fatalf("install: %v: %s", err, out)
				}
				dump, err := exec.CommandContext(t.Context(), filepath.Join(programs, "containerd"), "--config", main, "config", "dump").Output()
				if err != nil {
					t.Fatal(err)
				}
				for _, want := range []string{"runtimes.kata-checkpoint]", "io.containerd.kata-checkpoint.v2", "'kata-checkpoint.dev/*'", kata} {
					if !strings.Contains(strings.ReplaceAll(string(dump), `"`, "'"), want) {
						t.Errorf("containerd has not read %s", want)
					}
				}
			})
		}
	}
}
