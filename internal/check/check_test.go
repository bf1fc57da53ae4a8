// SPDX-License-Identifier: Apache-2.0

package check

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	cgroup2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	containers "github.com/containerd/containerd/api/services/containers/v1"
	introspection "github.com/containerd/containerd/api/services/introspection/v1"
	tasks "github.com/containerd/containerd/api/services/tasks/v1"
	versionservice "github.com/containerd/containerd/api/services/version/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-checkpoint/kata-checkpoint/internal/config"
	"github.com/kata-checkpoint/kata-checkpoint/internal/guestinitrd"
	"github.com/kata-checkpoint/kata-checkpoint/internal/version"
)

// node is a node on which all is well until a test changes it.
type node struct {
	t    *testing.T
	dir  string
	host *Host

	version string
	plugins []*introspection.Plugin
	// dump is what containerd prints of its configuration.
	dump string
	// noServer: it does not say which process it is.
	noServer bool
	// memory is that of the container abcdef.
	memory *cgroup2.MemoryStat
	// guest is what its runtime does with the container of --guest.
	guest *guest
}

const pid = 4711

func (n *node) Version(context.Context, *emptypb.Empty) (*versionservice.VersionResponse, error) {
	return &versionservice.VersionResponse{Version: n.version}, nil
}

type introspector struct {
	introspection.UnimplementedIntrospectionServer
	*node
}

func (i introspector) Server(ctx context.Context, r *emptypb.Empty) (*introspection.ServerResponse, error) {
	if i.noServer {
		return i.UnimplementedIntrospectionServer.Server(ctx, r)
	}
	return &introspection.ServerResponse{Pid: pid}, nil
}

func (i introspector) Plugins(context.Context, *introspection.PluginsRequest) (*introspection.PluginsResponse, error) {
	return &introspection.PluginsResponse{Plugins: i.plugins}, nil
}

type versioner struct {
	versionservice.UnimplementedVersionServer
	*node
}

func (v versioner) Version(ctx context.Context, e *emptypb.Empty) (*versionservice.VersionResponse, error) {
	return v.node.Version(ctx, e)
}

func (n *node) path(elem ...string) string { return filepath.Join(append([]string{n.dir}, elem...)...) }

func (n *node) write(name, text string, mode os.FileMode) {
	n.t.Helper()
	if err := os.MkdirAll(filepath.Dir(n.path(name)), 0o755); err != nil {
		n.t.Fatal(err)
	}
	if err := os.WriteFile(n.path(name), []byte(text), mode); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) script(name, says string) {
	n.write(name, "#!/bin/sh\n/bin/cat <<'EOF'\n"+says+"\nEOF\n", 0o755)
}

func (n *node) remove(name string) {
	n.t.Helper()
	if err := os.RemoveAll(n.path(name)); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) link(target, name string) {
	n.t.Helper()
	n.remove(name)
	if err := os.Symlink(target, n.path(name)); err != nil {
		n.t.Fatal(err)
	}
}

const kataConfiguration = `
[hypervisor.clh]
kernel = "KERNEL"
shared_fs = "virtio-fs"
`

func (n *node) dropIn(lines ...string) {
	n.write("kata/config.d/50.toml", strings.Join(lines, "\n")+"\n", 0o644)
}

func newNode(t *testing.T) *node {
	n := &node{t: t, dir: t.TempDir(), memory: &cgroup2.MemoryStat{Anon: 16 << 20, Shmem: 8 << 20, File: 1 << 30}, version: "v2.4.2", plugins: []*introspection.Plugin{
		{Type: "io.containerd.cri.v1", ID: "runtime"},
		{Type: "io.containerd.nri.v1", ID: "nri"},
	}}
	n.host = &Host{
		Config: &config.Config{
			DownstreamShim: "containerd-shim-kata-v2",
			KataConfigPath: n.path("kata/configuration-clh.toml"),
			StateDir:       n.path("state"),
			GuestBundle:    n.path("guest"),
			AgentPort:      10750, NRIRuntimeHandlers: []string{"kata-checkpoint"},
		},
		Containerd: n.path("containerd.sock"),
		Proc:       n.path("proc"),
	}
	n.guest = &guest{node: n, answer: goodAnswer(), fails: map[string]bool{}}
	n.dump = fmt.Sprintf(`
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
runtime_type = 'io.containerd.runc.v2'
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.kata-checkpoint]
runtime_type = '%s'
pod_annotations = ['kata-checkpoint.dev/*']
container_annotations = ['kata-checkpoint.dev/*']
`, Runtime)

	n.script("bin/"+ShimName, "")
	n.script("bin/criu", "Version: 4.2.1")
	n.script("bin/containerd-shim-kata-v2", `Kata Containers containerd shim (Golang): id: "io.containerd.kata.v2", version: 4.1.0, commit: 1`)
	n.write(fmt.Sprintf("proc/%d/environ", pid), "A=b\x00PATH="+n.path("bin")+"\x00", 0o644)
	n.write(fmt.Sprintf("proc/%d/cmdline", pid), "containerd\x00--config\x00"+n.path("config.toml")+"\x00", 0o644)
	// It has started 100 s after boot, half a minute after now.
	n.write(fmt.Sprintf("proc/%d/stat", pid), fmt.Sprintf("%d (containerd) S 1 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 10000 0", pid), 0o644)
	n.write("proc/stat", fmt.Sprintf("cpu 0\nbtime %d\n", time.Now().Unix()-70), 0o644)
	n.write("config.toml", "", 0o644)
	n.process(1, 0, "/sbin/init")
	n.process(99, pid, "/opt/nri/plugins/90-"+NRIPluginName)

	n.write("kata/configuration-clh.toml", strings.ReplaceAll(kataConfiguration, "KERNEL", n.path("kata/vmlinux.container")), 0o644)
	n.dropIn("[hypervisor.clh]", `guest_hook_path = "/run/kata-containers/shared/containers/sandbox-mounts/guest/hooks"`,
		"[runtime]", fmt.Sprintf("sandbox_bind_mounts = [%q]", n.path("guest")))
	n.write("kata/vmlinux-6.18.35-202", "", 0o644)
	n.link("vmlinux-6.18.35-202", "kata/vmlinux.container")
	n.kernelConfig("")

	for _, name := range []string{"bin/kata-checkpoint-helper", "bin/kata-checkpoint-launcher", "bin/criu", "hooks/prestart/kata-checkpoint-agent-hook", "criu/bin/criu", "criu/bin/tar", "criu/bin/gzip"} {
		n.script("guest/"+name, "")
	}
	// As the agent itself: without the flag it prints its usage.
	n.write("guest/bin/kata-checkpoint-agent", "#!/bin/sh\n[ \"$*\" = --version ] && echo kata-checkpoint-agent "+version.Version+"\n", 0o755)
	n.write("guest/agent.json", `{"vsock_port":10750}`, 0o644)
	return n
}

// kernelConfig writes the configuration beside the kernel, without an option.
func (n *node) kernelConfig(without string) {
	var b strings.Builder
	for _, o := range KernelOptions {
		if o != without {
			fmt.Fprintf(&b, "CONFIG_%s=y\n", o)
		}
	}
	n.write("kata/config-6.18.35-202", b.String(), 0o644)
}

// run makes the checks of the node, with a containerd that serves.
func (n *node) run() Findings {
	n.t.Helper()
	n.serve()
	return n.host.Run(n.t.Context())
}

// serve starts the node's containerd.
func (n *node) serve() {
	n.t.Helper()
	n.script(fmt.Sprintf("proc/%d/exe", pid), n.dump)
	if _, err := os.Stat(n.path("no-containerd")); err != nil {
		l, err := net.Listen("unix", n.host.Containerd)
		if err != nil {
			n.t.Fatal(err)
		}
		s := grpc.NewServer()
		versionservice.RegisterVersionServer(s, versioner{node: n})
		introspection.RegisterIntrospectionServer(s, introspector{node: n})
		tasks.RegisterTasksServer(s, &metrics{memory: n.memory, guest: n.guest})
		containers.RegisterContainersServer(s, n.guest)
		go func() { _ = s.Serve(l) }()
		n.t.Cleanup(s.Stop)
	}
}

// process adds one to the node's procfs, instead of one with this pid.
func (n *node) process(pid, parent int, exe string) {
	n.t.Helper()
	n.write(fmt.Sprintf("proc/%d/cmdline", pid), exe+"\x00", 0o644)
	n.write(fmt.Sprintf("proc/%d/stat", pid), fmt.Sprintf("%d (%s) S %d 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 10000 0", pid, filepath.Base(exe), parent), 0o644)
	n.link(exe, fmt.Sprintf("proc/%d/exe", pid))
}

// The plugin is one that containerd has started, under the name that install gives
// it or with the program's own, or a service.
func TestNRIPluginRuns(t *testing.T) {
	for _, tc := range []struct {
		exe    string
		parent int
		want   bool
	}{
		{"/opt/nri/plugins/90-kata-checkpoint", pid, true},
		{"/opt/nri/plugins/10-kata-checkpoint-nri", pid, true},
		{"/opt/nri/plugins/90-kata-checkpoint (deleted)", pid, true},
		{"/usr/local/bin/kata-checkpoint-nri", 1, true},
		{"/opt/nri/plugins/90-kata-checkpoint", pid + 1, false},
		{"/usr/bin/kata-checkpoint", pid, false},
		{"/opt/nri/plugins/90-another", pid, false},
	} {
		n := newNode(t)
		n.process(99, tc.parent, tc.exe)
		i := slices.IndexFunc(n.run(), func(f Finding) bool { return f.Check == "nri.plugin" && f.Level == OK })
		if (i >= 0) != tc.want {
			t.Errorf("%s, whose parent is %d: running %t", tc.exe, tc.parent, i >= 0)
		}
	}
}

func TestAllIsWell(t *testing.T) {
	n := newNode(t)
	findings := n.run()
	var checks []string
	for _, f := range findings {
		if f.Level != OK || f.Cure != "" {
			t.Errorf("%s %s: %s (%s)", f.Level, f.Check, f.Text, f.Cure)
		}
		checks = append(checks, f.Check)
	}
	want := []string{
		"containerd.version", "runtime.shim", "runtime.handler", "nri.containerd", "nri.plugin", "kata.shim", "kata.config",
		"kata.shared_fs", "kata.sandbox_bind_mounts", "kata.guest_hook_path", "kata.kernel", "bundle", "criu", "state_dir.space", "state_dir.reflink",
	}
	if !slices.Equal(checks, want) {
		t.Errorf("got checks\n%v\nwant\n%v", checks, want)
	}
}

// hostFault is something that is wrong with a node, and the finding of it.
type hostFault struct {
	fault func(*node)
	check string
	level Level
	// text and cure are parts of what it says.
	text, cure string
}

const rustShim = `Kata Containers containerd shim (Rust): id: io.containerd.kata.v2, version: 4.1.0, commit: 1`

// statfs has the node's file systems changed.
func (n *node) statfs(change func(*unix.Statfs_t) error) {
	n.host.statfs = func(path string, st *unix.Statfs_t) error {
		if err := unix.Statfs(path, st); err != nil {
			return err
		}
		return change(st)
	}
}

// inInitrd lets the node's guests have the agent in an initrd of a release.
func (n *node) inInitrd(release string) {
	n.t.Helper()
	n.write("kata/config.d/60.toml", fmt.Sprintf("[hypervisor.clh]\nimage = \"\"\ninitrd = %q\nguest_hook_path = %q\n", n.path("kata/initrd"), guestinitrd.HookPath), 0o644)
	n.write("kata/initrd.kata", "070701", 0o644)
	if release == "" {
		n.write("kata/initrd", "070701", 0o644)
		return
	}
	_, err := guestinitrd.Append(&guestinitrd.Options{Base: n.path("kata/initrd.kata"), Bundle: n.path("guest"), Version: release, Out: n.path("kata/initrd")})
	if err != nil {
		n.t.Fatal(err)
	}
}

func hostFaults() map[string]hostFault {
	return map[string]hostFault{
		"no containerd": {
			func(n *node) { n.write("no-containerd", "", 0o644); n.t.Setenv("PATH", n.path("bin")) },
			"containerd", Error, "does not run", "--address",
		},
		"an old containerd":     {func(n *node) { n.version = "v1.7.28" }, "containerd.version", Error, "v1.7.28 is too old", "2.1"},
		"no shim":               {func(n *node) { n.remove("bin/" + ShimName) }, "runtime.shim", Error, "not on containerd's PATH", "install"},
		"a shim that is a file": {func(n *node) { n.write("bin/"+ShimName, "", 0o644); _ = os.Chmod(n.path("bin/"+ShimName), 0o644) }, "runtime.shim", Error, "not on containerd's PATH", "install"},
		"no handler":            {func(n *node) { n.dump = "" }, "runtime.handler", Warning, "no runtime handler", "configs/containerd"},
		"a handler without annotations": {
			func(n *node) { n.dump = strings.ReplaceAll(n.dump, "container_annotations", "other") },
			"runtime.handler", Warning, "annotations", "container_annotations",
		},
		"a handler that NRI leaves alone": {
			func(n *node) { n.host.Config.NRIRuntimeHandlers = []string{"other"} },
			"runtime.handler", Error, "leaves containers", `add "kata-checkpoint" to nri_runtime_handlers`,
		},
		"configuration that nobody has read": {
			func(n *node) {
				later := time.Now().Add(time.Minute)
				if err := os.Chtimes(n.path("config.toml"), later, later); err != nil {
					n.t.Fatal(err)
				}
			},
			"containerd.config", Warning, "has not read it", "restart containerd",
		},
		"NRI is off": {func(n *node) { n.plugins = n.plugins[:1] }, "nri.containerd", Error, "NRI is off", "disable = false"},
		"NRI failed": {
			func(n *node) { n.plugins[1].InitErr = &status.Status{Code: 2, Message: "x"} },
			"nri.containerd", Error, "NRI is off", "disable = false",
		},
		"no NRI plugin": {func(n *node) { n.remove("proc/99") }, "nri.plugin", Error, "does not run", "systemctl"},
		"another containerd's NRI plugin": {
			func(n *node) { n.remove("proc/99"); n.process(99, 1, "/opt/nri/plugins/90-"+NRIPluginName) },
			"nri.plugin", Error, "does not run", "systemctl",
		},
		"no Kata":         {func(n *node) { n.remove("bin/containerd-shim-kata-v2") }, "kata.shim", Error, "not on containerd's PATH", "downstream_shim"},
		"an old Kata":     {func(n *node) { n.script("bin/containerd-shim-kata-v2", "(Golang) version: 3.19.1") }, "kata.shim", Error, "3.19.1, which is too old", "4.1.0"},
		"a broken shim":   {func(n *node) { n.write("bin/containerd-shim-kata-v2", "#!/bin/false\n", 0o755) }, "kata.shim", Error, "does not run", "reinstall"},
		"no Kata config":  {func(n *node) { n.remove("kata/configuration-clh.toml") }, "kata.config", Error, "no such file", "kata_config_path"},
		"a config of ini": {func(n *node) { n.dropIn("[hypervisor") }, "kata.config", Error, "50.toml", "mend"},
		"a linked drop-in under the Rust shim": {
			func(n *node) {
				n.script("bin/containerd-shim-kata-v2", rustShim)
				n.link("50.toml", "kata/config.d/60.toml")
			},
			"kata.config", Error, "not a regular file", "copy",
		},
		"another shared_fs": {
			func(n *node) { n.write("kata/config.d/60.toml", "[hypervisor.clh]\nshared_fs = \"none\"\n", 0o644) },
			"kata.shared_fs", Error, `"none"`, `shared_fs = "virtio-fs"`,
		},
		"no bundle in the guest": {
			func(n *node) {
				n.write("kata/config.d/60.toml", "[runtime]\nsandbox_bind_mounts = [\"/other\"]\n", 0o644)
			},
			"kata.sandbox_bind_mounts", Error, "lacks the guest bundle", `sandbox_bind_mounts = ["/other", `,
		},
		"the Go shim's hook path under the Rust shim": {
			func(n *node) { n.script("bin/containerd-shim-kata-v2", rustShim) },
			"kata.guest_hook_path", Error, "no hook of ours", "/run/kata-containers/shared/containers/passthrough/sandbox-mounts/guest/hooks",
		},
		"no kernel":         {func(n *node) { n.remove("kata/vmlinux-6.18.35-202") }, "kata.kernel", Error, "no such file", "guest-kernel"},
		"Kata's own kernel": {func(n *node) { n.kernelConfig("CHECKPOINT_RESTORE") }, "kata.kernel", Error, "lacks CHECKPOINT_RESTORE", "guest-kernel"},
		"a distribution's kernel": {
			func(n *node) {
				config, err := os.ReadFile(n.path("kata/config-6.18.35-202"))
				if err != nil {
					n.t.Fatal(err)
				}
				n.write("kata/config-6.18.35-202", strings.ReplaceAll(string(config), "_DIAG=y", "_DIAG=m"), 0o644)
			},
			"kata.kernel", Warning, "has UNIX_DIAG, INET_DIAG, ", "guest-kernel",
		},
		"an unknown kernel":               {func(n *node) { n.remove("kata/config-6.18.35-202") }, "kata.kernel", Warning, "not known", ".config"},
		"half a bundle":                   {func(n *node) { n.remove("guest/criu/bin/tar") }, "bundle", Error, "not whole", "guest_bundle"},
		"a bundle that others can change": {func(n *node) { _ = os.Chmod(n.path("guest"), 0o777) }, "bundle", Error, "can be changed", "chmod"},
		"a hook that is a link":           {func(n *node) { n.link("../../bin/criu", "guest/hooks/prestart/kata-checkpoint-agent-hook") }, "bundle", Error, "not an executable file", "install"},
		"another release's bundle": {
			func(n *node) { n.script("guest/bin/kata-checkpoint-agent", "kata-checkpoint-agent v0.0.1") },
			"bundle", Warning, "v0.0.1", "install",
		},
		"another port":    {func(n *node) { n.write("guest/agent.json", `{"vsock_port":1}`, 0o644) }, "bundle.port", Error, "port 1, ", "agent_port = 1"},
		"no criu":         {func(n *node) { n.remove("bin/criu") }, "criu", Error, "refuses every checkpoint", "ln -s"},
		"a broken criu":   {func(n *node) { n.write("bin/criu", "#!/bin/false\n", 0o755) }, "criu", Error, "does not run", "ln -s"},
		"state is a file": {func(n *node) { n.write("state", "", 0o600) }, "state_dir", Error, "not a directory", "state_dir"},
		"state for all to see": {
			func(n *node) {
				if err := os.Mkdir(n.path("state"), 0o755); err != nil {
					n.t.Fatal(err)
				}
			},
			"state_dir", Warning, "can be read by others", "chmod 700",
		},
		"state in memory": {func(n *node) { n.host.Config.StateDir = "/dev/shm/kata-checkpoint" }, "state_dir", Warning, "in memory", "disk"},
		"state on a disk that does not answer": {
			func(n *node) { n.statfs(func(*unix.Statfs_t) error { return unix.EIO }) }, "state_dir", Error, "input/output error", "disk",
		},
		"state that is read-only": {
			func(n *node) { n.statfs(func(st *unix.Statfs_t) error { st.Flags |= unix.ST_RDONLY; return nil }) },
			"state_dir", Error, "is read-only", "can be written",
		},
		"state without room": {
			func(n *node) { n.statfs(func(st *unix.Statfs_t) error { st.Bavail = 1; return nil }) },
			"state_dir.space", Warning, "0 MiB left", "make room",
		},
		"a file where a socket should be": {
			func(n *node) {
				n.host.Containerd = n.path("100%.sock")
				n.write("100%.sock", "", 0o600)
				n.write("no-containerd", "", 0o644)
				n.t.Setenv("PATH", n.path("bin"))
			},
			"containerd", Error, "is not a socket", "--address",
		},
		"a containerd that does not answer": {
			func(n *node) {
				n.write("containerd.sock", "", 0o600)
				n.write("no-containerd", "", 0o644)
				n.t.Setenv("PATH", n.path("bin"))
			},
			"containerd", Error, "does not answer", "--address",
		},
		"a containerd that does not say who it is": {
			func(n *node) { n.noServer = true; n.t.Setenv("PATH", n.path("bin")) },
			"containerd", Warning, "which process it is", "log",
		},
		"a containerd in another PID namespace": {
			func(n *node) { n.remove(fmt.Sprintf("proc/%d/environ", pid)); n.t.Setenv("PATH", n.path("bin")) },
			"containerd", Warning, "environment of containerd cannot be read", "as root",
		},
		"a configuration that containerd does not take": {
			func(n *node) { n.plugins, n.dump = nil, "[plugins" },
			"containerd.config", Warning, "cannot be read", "config dump",
		},
		"no configuration at Kata's places": {
			func(n *node) { n.host.Config.KataConfigPath, n.host.defaults = "", []string{n.path("none.toml")} },
			"kata.config", Error, "there is no configuration of Kata", "kata_config_path",
		},
		"a kernel configuration that cannot be read": {
			func(n *node) { n.remove("kata/config-6.18.35-202"); n.write("kata/config-6.18.35-202/x", "", 0o644) },
			"kata.kernel", Error, "is a directory", "guest-kernel",
		},
		"an agent for another machine": {
			func(n *node) { n.write("guest/bin/kata-checkpoint-agent", "#!/bin/false\n", 0o755) },
			"bundle", Error, "the agent does not run", "install",
		},
		"a port that cannot be read": {func(n *node) { n.write("guest/agent.json", "{", 0o644) }, "bundle.port", Error, "agent.json", "install"},
		"no initrd": {
			func(n *node) {
				n.write("kata/config.d/60.toml", fmt.Sprintf("[hypervisor.clh]\nguest_hook_path = %q\n", guestinitrd.HookPath), 0o644)
			},
			"kata.initrd", Error, "no initrd is set", "guest-initrd",
		},
		"an initrd without the agent":        {func(n *node) { n.inInitrd("") }, "kata.initrd", Error, "no agent of kata-checkpoint", "guest-initrd --initrd"},
		"an initrd with the agent of before": {func(n *node) { n.inInitrd("v0.0.1") }, "kata.initrd", Warning, "v0.0.1", "guest-initrd"},
	}
}

// Each fault is found, on its own, under the name and with the level that it
// should have, and nothing else is.
func TestEachFault(t *testing.T) {
	for name, c := range hostFaults() {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			c.fault(n)
			findings := slices.DeleteFunc(n.run(), func(f Finding) bool { return f.Level == OK })
			if len(findings) != 1 {
				t.Fatalf("got %d findings, want one: %+v", len(findings), findings)
			}
			f := findings[0]
			if f.Check != c.check || f.Level != c.level || !strings.Contains(f.Text, c.text) || !strings.Contains(f.Cure, c.cure) {
				t.Errorf("got %+v", f)
			}
			if findings.Worst() != c.level {
				t.Errorf("the worst is %s", findings.Worst())
			}
		})
	}
}

// With the agent in the initrd nothing is shared with the guest, and nothing is
// amiss.
func TestInitrd(t *testing.T) {
	n := newNode(t)
	n.inInitrd(version.Version)
	n.write("kata/config.d/50.toml", "", 0o644)
	findings := n.run()
	i := slices.IndexFunc(findings, func(f Finding) bool { return f.Check == "kata.initrd" })
	if findings.Worst() != OK || i < 0 || !strings.Contains(findings[i].Text, version.Version) {
		t.Errorf("got %+v", findings)
	}
}

func TestNoCRI(t *testing.T) {
	n := newNode(t)
	n.plugins, n.dump = nil, ""
	n.remove("bin/criu")
	if f := n.run(); f.Worst() != OK {
		t.Errorf("ctr and nerdctl need neither NRI nor criu: %+v", f)
	}
}

// What is checked is what configs/kernel asks for.
func TestKernelOptions(t *testing.T) {
	data, err := os.ReadFile("../../configs/kernel/kata-checkpoint.conf")
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	for _, m := range regexp.MustCompile(`(?m)^CONFIG_(\w+)=y$`).FindAllSubmatch(data, -1) {
		want = append(want, string(m[1]))
	}
	slices.Sort(want)
	got := slices.Sorted(slices.Values(KernelOptions))
	if !slices.Equal(got, want) {
		t.Errorf("checked are\n%v\nthe fragment has\n%v", got, want)
	}
}
