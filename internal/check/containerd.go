// SPDX-License-Identifier: Apache-2.0

package check

import (
	"bytes"
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

	introspection "github.com/containerd/containerd/api/services/introspection/v1"
	versionservice "github.com/containerd/containerd/api/services/version/v1"
	"github.com/pelletier/go-toml/v2"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
	"github.com/kata-checkpoint/kata-checkpoint/internal/config"
	"github.com/kata-checkpoint/kata-checkpoint/internal/procfs"
)

const (
	// Runtime is the name of our runtime.
	Runtime = "io.containerd.kata-checkpoint.v2"
	// ShimName is the binary that containerd looks for on its PATH.
	ShimName = "containerd-shim-kata-checkpoint-v2"
	nriName  = "kata-checkpoint-nri"
	// NRIPluginName is the name of the NRI plugin in containerd's directory of
	// plugins, behind its index there.
	NRIPluginName = "kata-checkpoint"

	minContainerd = "2.1"
	answerTimeout = 5 * time.Second
)

// Host is what is looked at.
type Host struct {
	// Config is our configuration.
	Config *config.Config
	// Containerd is the path of containerd's socket.
	Containerd string
	// Proc is where procfs is mounted, /proc if it is empty.
	Proc string

	// statfs is statfs(2), defaults are where Kata's shim looks for its
	// configuration, and probeDir is where the container of --guest has its
	// files; tests replace them.
	statfs   func(path string, st *unix.Statfs_t) error
	defaults []string
	probeDir string
}

// space returns what statfs(2) says of a file system.
func (h *Host) space(path string) (st unix.Statfs_t, err error) {
	if h.statfs != nil {
		err = h.statfs(path, &st)
	} else {
		err = unix.Statfs(path, &st)
	}
	return st, err
}

func (h *Host) proc(elem ...string) string {
	root := h.Proc
	if root == "" {
		root = "/proc"
	}
	return filepath.Join(append([]string{root}, elem...)...)
}

// daemon is the containerd that runs.
type daemon struct {
	pid int
	// path is its PATH, where it looks for shims and for criu.
	path string
	// state is its state directory.
	state string
	// runtimes are the CRI's handlers, by name, that use our runtime.
	runtimes map[string]handler
	// cri and nri say that the plugins are there and work.
	cri, nri bool
}

// handler is a runtime of the CRI plugin.
type handler struct {
	Type                 string   `toml:"runtime_type"`
	PodAnnotations       []string `toml:"pod_annotations"`
	ContainerAnnotations []string `toml:"container_annotations"`
	Options              struct {
		ConfigPath string `toml:"ConfigPath"`
	} `toml:"options"`
}

// containerd asks the containerd that runs what it is. It returns nil where
// none answers.
func (h *Host) containerd(ctx context.Context, f *Findings) *daemon {
	const check = "containerd"
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	if _, err := os.Stat(h.Containerd); err != nil {
		f.fail(check, "start containerd, or name its socket with --address", "containerd does not run: %v", err)
		return nil
	}
	conn, err := grpc.NewClient("unix://"+h.Containerd, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		f.fail(check, "name containerd's socket with --address", "%s is not a socket: %v", h.Containerd, err)
		return nil
	}
	defer conn.Close()
	v, err := versionservice.NewVersionClient(conn).Version(ctx, &emptypb.Empty{})
	if err != nil {
		f.fail(check, "systemctl start containerd, or name its socket with --address", "containerd does not answer at %s: %v", h.Containerd, err)
		return nil
	}
	if !atLeast(v.Version, minContainerd) {
		f.fail(check+".version", "install containerd "+minContainerd+" or later", "containerd %s is too old", v.Version)
	} else {
		f.ok(check+".version", "containerd %s runs", v.Version)
	}
	services := introspection.NewIntrospectionClient(conn)
	server, err := services.Server(ctx, &emptypb.Empty{})
	if err != nil {
		f.warn(check, "look at containerd's log", "containerd does not say which process it is: %v", err)
		return &daemon{path: os.Getenv("PATH")}
	}
	d := &daemon{pid: int(server.Pid)} //nolint:gosec // a pid
	if d.path, err = h.environ(d.pid, "PATH"); err != nil {
		f.warn(check, "run this as root in the PID namespace of containerd", "the environment of containerd cannot be read: %v", err)
		d.path = os.Getenv("PATH")
	}
	if plugins, err := services.Plugins(ctx, &introspection.PluginsRequest{}); err == nil {
		for _, p := range plugins.Plugins {
			works := p.InitErr == nil
			switch {
			case p.Type == "io.containerd.cri.v1" && p.ID == "runtime":
				d.cri = works
			case p.Type == "io.containerd.nri.v1":
				d.nri = works
			}
		}
	}
	if err = h.dump(ctx, d, f); err != nil {
		f.warn(check+".config", "run `containerd config dump` and mend what it complains about", "containerd's configuration cannot be read: %v", err)
	}
	return d
}

// environ returns a variable of a process.
func (h *Host) environ(pid int, name string) (string, error) {
	data, err := os.ReadFile(h.proc(strconv.Itoa(pid), "environ"))
	if err != nil {
		return "", err
	}
	for v := range bytes.SplitSeq(data, []byte{0}) {
		if value, ok := bytes.CutPrefix(v, []byte(name+"=")); ok {
			return string(value), nil
		}
	}
	return "", fmt.Errorf("it has no variable %s", name)
}

// dump reads the configuration of a containerd, which prints it with all imports
// merged: the handlers with our runtime, and the state directory.
func (h *Host) dump(ctx context.Context, d *daemon, f *Findings) error {
	pid := d.pid
	cmdline, err := os.ReadFile(h.proc(strconv.Itoa(pid), "cmdline"))
	if err != nil {
		return err
	}
	path := "/etc/containerd/config.toml"
	args := strings.Split(strings.TrimRight(string(cmdline), "\x00"), "\x00")
	for i, arg := range args {
		switch name, value, joined := strings.Cut(arg, "="); {
		case name != "-c" && name != "--config" && name != "-config":
		case joined:
			path = value
		case i+1 < len(args):
			path = args[i+1]
		}
	}
	cmd := exec.CommandContext(ctx, h.proc(strconv.Itoa(pid), "exe"), "--config", path, "config", "dump")
	cmd.Args[0] = "containerd"
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("%w: %s", err, strings.TrimSpace(stderr.String()))
	}
	var dump struct {
		State   string   `toml:"state"`
		Imports []string `toml:"imports"`
		Plugins map[string]struct {
			Containerd struct {
				Runtimes map[string]handler `toml:"runtimes"`
			} `toml:"containerd"`
		} `toml:"plugins"`
	}
	if err := toml.Unmarshal(out, &dump); err != nil {
		return err
	}
	d.state = dump.State
	h.stale(pid, append([]string{path}, dump.Imports...), f)
	d.runtimes = map[string]handler{}
	for name, r := range dump.Plugins["io.containerd.cri.v1.runtime"].Containerd.Runtimes {
		if r.Type == Runtime {
			d.runtimes[name] = r
		}
	}
	return nil
}

// stale finds configuration that containerd has not read yet.
func (h *Host) stale(pid int, patterns []string, f *Findings) {
	started, err := procfs.Started(h.proc(), pid)
	if err != nil {
		return
	}
	for _, pattern := range patterns {
		files, _ := filepath.Glob(pattern) // a malformed pattern has no files
		for _, file := range files {
			if st, err := os.Stat(file); err == nil && st.ModTime().After(started.Add(time.Second)) {
				f.warn("containerd.config", "systemctl restart containerd", "%s is newer than the containerd that runs, which has not read it", file)
			}
		}
	}
}

// runtime looks for our shim, and for the CRI's handlers.
func (h *Host) runtime(d *daemon, f *Findings) {
	if d == nil {
		return
	}
	const check = "runtime.shim"
	path, err := lookPath(ShimName, d.path)
	if err != nil {
		f.fail(check, "kata-checkpoint install, or put the shim into a directory of containerd's PATH", "%s is not on containerd's PATH, %s", ShimName, d.path)
	} else {
		f.ok(check, "%s", path)
	}
	if !d.cri {
		f.ok("runtime.handler", "containerd serves no CRI here: ctr and nerdctl need no handler")
		return
	}
	if len(d.runtimes) == 0 {
		f.warn("runtime.handler", "run kata-checkpoint install, or copy configs/containerd/kata-checkpoint.toml to /etc/containerd/conf.d/ and import it in /etc/containerd/config.toml, and restart containerd",
			"no runtime handler of the CRI uses %s: pods cannot be checkpointed, containers of ctr and nerdctl can", Runtime)
	}
	for name, r := range d.runtimes {
		const ours = annotations.Prefix + "*"
		switch {
		case !slices.Contains(r.PodAnnotations, ours) || !slices.Contains(r.ContainerAnnotations, ours):
			f.warn("runtime.handler", "add '"+ours+"' to pod_annotations and to container_annotations of the handler, as in configs/containerd/kata-checkpoint.toml",
				"the runtime handler %s does not pass our annotations on: pods cannot choose what becomes of a container, and cannot be restored", name)
		case !slices.Contains(h.Config.NRIRuntimeHandlers, name):
			f.fail("runtime.handler", "add "+strconv.Quote(name)+" to nri_runtime_handlers in config.toml and restart "+nriName,
				"the NRI plugin leaves containers of the runtime handler %s alone: they fail to start", name)
		default:
			f.ok("runtime.handler", "the CRI's runtime handler %s", name)
		}
	}
}

// nri looks for NRI in containerd and for our plugin.
func (h *Host) nri(d *daemon, f *Findings) {
	if d == nil || !d.cri || len(d.runtimes) == 0 {
		return
	}
	if !d.nri {
		f.fail("nri.containerd", "set disable = false in [plugins.'io.containerd.nri.v1.nri'] of containerd's configuration and restart it",
			"NRI is off in containerd: containers of pods fail to start")
		return
	}
	f.ok("nri.containerd", "NRI is on in containerd")
	if path := h.nriPlugin(d.pid); path != "" {
		f.ok("nri.plugin", "%s runs", path)
		return
	}
	f.fail("nri.plugin", "kata-checkpoint install and systemctl restart containerd, or systemctl enable --now "+nriName, "%s does not run: containers of pods fail to start", nriName)
}

// nriPlugin returns the path of our NRI plugin, if it runs: as a service, or as a
// child of containerd's, which starts what is named NN-NAME in its directory of
// plugins. Another containerd's serves no pods of this one.
func (h *Host) nriPlugin(containerd int) string {
	links, err := filepath.Glob(h.proc("[0-9]*", "exe"))
	if err != nil {
		return ""
	}
	for _, link := range links {
		target, err := os.Readlink(link)
		if err != nil {
			continue
		}
		path := strings.TrimSuffix(target, " (deleted)")
		switch name := filepath.Base(path); {
		case name == nriName:
			return path
		case ofContainerd(name):
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(link)))
			if parent, err := procfs.Parent(h.proc(), pid); err == nil && parent == containerd {
				return path
			}
		}
	}
	return ""
}

// ofContainerd reports whether a file has a name by which containerd starts our
// plugin: [NRIPluginName] after two digits, or that of the service.
func ofContainerd(name string) bool {
	index, name, _ := strings.Cut(name, "-")
	_, err := strconv.ParseUint(index, 10, 8)
	return err == nil && len(index) == 2 && (name == NRIPluginName || name == nriName)
}

// criu looks for the CRIU that the CRI wants to see.
func (h *Host) criu(ctx context.Context, d *daemon, f *Findings) {
	if d == nil || !d.cri || len(d.runtimes) == 0 {
		return
	}
	const check = "criu"
	cure := "ln -s " + filepath.Join(h.Config.GuestBundle, "bin/criu") + " /usr/local/bin/criu, and restart containerd"
	path, err := lookPath("criu", d.path)
	if err != nil {
		f.fail(check, cure, "there is no criu on containerd's PATH: the CRI refuses every checkpoint")
		return
	}
	out, err := output(ctx, path, "--version")
	if err != nil {
		f.fail(check, cure, "%s does not run: %v", path, err)
		return
	}
	f.ok(check, "%s, %s", path, firstLine(out))
}

// lookPath is exec.LookPath with the PATH of another process.
func lookPath(name, path string) (string, error) {
	if filepath.IsAbs(name) {
		return executable(name)
	}
	for _, dir := range filepath.SplitList(path) {
		if file, err := executable(filepath.Join(dir, name)); err == nil {
			return file, nil
		}
	}
	return "", &exec.Error{Name: name, Err: exec.ErrNotFound}
}

func executable(path string) (string, error) {
	st, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	if !st.Mode().IsRegular() || st.Mode()&0o111 == 0 {
		return "", &fs.PathError{Op: "exec", Path: path, Err: errors.New("not an executable file")}
	}
	return path, nil
}

func output(ctx context.Context, name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, firstLine(string(out)))
	}
	return string(out), nil
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(strings.TrimSpace(s), "\n")
	return line
}
