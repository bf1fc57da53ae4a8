// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"bufio"
	"bytes"
	"debug/buildinfo"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/api"

	"github.com/kata-checkpoint/kata-checkpoint/integration/parts"
	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
)

// nriTimeout is for what happens soon, on any machine. The longest is a
// registration after NRI's first wait for a plugin that does not answer.
const nriTimeout = 2 * time.Minute

// TestNRI runs the plugin's binary against the version of NRI that each release
// of containerd carries.
func TestNRI(t *testing.T) {
	if testing.Short() {
		t.Skip("builds a program for each release of containerd, which takes minutes: not with -short")
	}
	p, err := parts.Find()
	if err != nil {
		t.Fatal(err)
	}
	for _, release := range append([]string{parts.ContainerdVersion}, parts.OlderContainerds...) {
		t.Run(release, func(t *testing.T) {
			program, err := p.NRIRuntime(t.Context(), release)
			if err != nil {
				t.Fatal(err)
			}
			info, err := buildinfo.ReadFile(program)
			if err != nil {
				t.Fatal(err)
			}
			for _, module := range info.Deps {
				if module.Path == "github.com/containerd/nri" {
					t.Logf("containerd %s carries NRI %s", release, module.Version)
				}
			}
			bench := nriBench{T: t, runtime: program, plugin: p.Bin("kata-checkpoint-nri"), release: release, dir: t.TempDir()}
			t.Run("service", func(t *testing.T) { bench.on(t).service() })
			t.Run("pre-installed", func(t *testing.T) { bench.on(t).preinstalled() })
		})
	}
}

// nriBench has a directory in which runtimes and plugins find each other.
type nriBench struct {
	*testing.T
	runtime, plugin string // the programs
	release         string
	dir             string
}

func (b nriBench) on(t *testing.T) *nriBench {
	t.Helper()
	b.T, b.dir = t, t.TempDir()
	return &b
}

// service: the plugin waits for containerd, and comes back after whatever has
// parted the two. In between, containers are created as they are.
func (b *nriBench) service() {
	plugin := b.startPlugin()
	runtime := b.startRuntime()
	b.checkAdjusted(runtime.waitAdjusted(true))
	for _, handler := range []string{"", "runc", "kata"} {
		if a := runtime.create(handler); len(a.GetMounts()) > 0 || len(a.GetAnnotations()) > 0 {
			b.Errorf("a container of the handler %q is adjusted by %v", handler, a)
		}
	}

	runtime.kill(syscall.SIGKILL)
	runtime = b.startRuntime()
	b.checkAdjusted(runtime.waitAdjusted(true))

	// It lets NRI wait for too long, and is let go.
	plugin.signal(syscall.SIGSTOP)
	runtime.checkUnadjusted()
	plugin.signal(syscall.SIGCONT)
	b.checkAdjusted(runtime.waitAdjusted(true))

	plugin.kill(syscall.SIGKILL)
	runtime.checkUnadjusted()
	plugin = b.startPlugin()
	b.checkAdjusted(runtime.waitAdjusted(true))
	if state := plugin.kill(syscall.SIGTERM); !state.Success() {
		b.Errorf("at SIGTERM the plugin ends with %s", state)
	}
	runtime.checkUnadjusted()
}

// preinstalled: NRI starts the plugin, which is there for the first container,
// and ends with the runtime.
func (b *nriBench) preinstalled() {
	installed := filepath.Join(b.dir, "plugins/90-kata-checkpoint")
	b.check(os.Mkdir(filepath.Dir(installed), 0o700))
	data, err := os.ReadFile(b.plugin)
	b.check(err)
	b.check(os.WriteFile(installed, data, 0o700))
	// What NRI starts gets no environment: the defaults hold, and
	// /etc/kata-checkpoint/config.toml, if it is there.
	runtime := b.startRuntime()
	b.checkAdjusted(runtime.create("kata-checkpoint"))
	if a := runtime.create("runc"); len(a.GetMounts()) > 0 || len(a.GetAnnotations()) > 0 {
		b.Errorf("a container of another handler is adjusted by %v", a)
	}
	plugins := runningFrom(installed)
	if len(plugins) != 1 {
		b.Fatalf("processes of the plugin: %v", plugins)
	}
	b.check(syscall.Kill(plugins[0], syscall.SIGKILL))
	runtime.checkUnadjusted()

	runtime.kill(syscall.SIGKILL)
	runtime = b.startRuntime()
	b.checkAdjusted(runtime.create("kata-checkpoint"))
	runtime.kill(syscall.SIGKILL)
	b.waitFor("the plugin ends with the runtime that has started it", func() bool { return len(runningFrom(installed)) == 0 })
}

func (b *nriBench) check(err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

// waitFor waits for a condition.
func (b *nriBench) waitFor(what string, condition func() bool) {
	b.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.After(nriTimeout); !condition(); {
		select {
		case <-deadline:
			b.Fatalf("not after %s: %s", nriTimeout, what)
		case <-tick.C:
		}
	}
}

// checkAdjusted checks what the container of [nriRuntime.create] gets.
func (b *nriBench) checkAdjusted(a *api.ContainerAdjustment) {
	b.Helper()
	got := a.GetAnnotations()
	if got[annotations.NRIKey] == "" || got[annotations.AfterKey] != "stop" || got[annotations.ExternalMountsKey] != "/dev/shm,/tmp" || len(got) != 3 {
		b.Errorf("the container gets the annotations %v", got)
	}
	m := a.GetMounts()
	if len(m) != 1 || m[0].GetDestination() != "/.kata-checkpoint" || m[0].GetType() != "bind" || !strings.HasSuffix(m[0].GetSource(), "/exchange/k8s.io--c1") {
		b.Errorf("the container gets the mounts %v", m)
	}
}

// nriProcess is a program under test.
type nriProcess struct {
	*nriBench
	cmd    *exec.Cmd
	ended  chan struct{}
	stderr *syncBuffer
}

func (b *nriBench) start(cmd *exec.Cmd) *nriProcess {
	b.Helper()
	p := &nriProcess{nriBench: b, cmd: cmd, ended: make(chan struct{}), stderr: &syncBuffer{}}
	cmd.Stderr = p.stderr
	b.check(cmd.Start())
	go func() {
		_ = cmd.Wait() // its state says how it has ended
		close(p.ended)
	}()
	b.Cleanup(func() {
		p.kill(syscall.SIGKILL)
		if b.Failed() {
			b.Logf("%s:\n%s", filepath.Base(cmd.Path), p.stderr)
		}
	})
	return p
}

func (p *nriProcess) signal(s syscall.Signal) {
	p.Helper()
	p.check(p.cmd.Process.Signal(s))
}

// kill ends the process by a signal and waits for its end.
func (p *nriProcess) kill(s syscall.Signal) *os.ProcessState {
	p.Helper()
	_ = p.cmd.Process.Signal(s) // it may have ended
	select {
	case <-p.ended:
	case <-time.After(nriTimeout):
		p.Fatalf("%s does not end at %s", p.cmd.Path, s)
	}
	return p.cmd.ProcessState
}

// startPlugin runs the plugin as a service.
func (b *nriBench) startPlugin() *nriProcess {
	b.Helper()
	config := filepath.Join(b.dir, "config.toml")
	b.check(os.WriteFile(config, []byte("state_dir = '/elsewhere'\n"), 0o600))
	return b.start(exec.Command(b.plugin, "--config", config, "--idx", "90", "--name", "kata-checkpoint", "--socket", filepath.Join(b.dir, "nri.sock")))
}

// nriRuntime stands where containerd does.
type nriRuntime struct {
	*nriProcess
	requests *json.Encoder
	answers  *bufio.Scanner
}

func (b *nriBench) startRuntime() *nriRuntime {
	b.Helper()
	cmd := exec.Command(b.runtime, "--dir", b.dir, "--containerd", b.release)
	in, err := cmd.StdinPipe()
	b.check(err)
	// Not StdoutPipe, which the process's end closes while there is something
	// to read.
	out, write, err := os.Pipe()
	b.check(err)
	b.Cleanup(func() { out.Close() })
	cmd.Stdout = write
	p := b.start(cmd)
	write.Close()
	return &nriRuntime{nriProcess: p, requests: json.NewEncoder(in), answers: bufio.NewScanner(out)}
}

// create has a container of a pod created and gives its adjustment.
func (r *nriRuntime) create(handler string) *api.ContainerAdjustment {
	r.Helper()
	r.check(r.requests.Encode(map[string]any{
		"Pod": &api.PodSandbox{Id: "p1", Name: "web", Namespace: "shop", RuntimeHandler: handler, Annotations: map[string]string{annotations.AfterKey: "stop", "other": "x"}},
		"Container": &api.Container{
			Id: "c1", PodSandboxId: "p1", Name: "nginx",
			Annotations: map[string]string{annotations.ExternalMountsKey: "/tmp"},
			Mounts:      []*api.Mount{{Destination: "/dev/shm", Type: "bind", Source: "/run/shm"}},
		},
	}))
	if !r.answers.Scan() {
		r.Fatalf("no answer: %v", r.answers.Err())
	}
	var answer struct {
		Adjust *api.ContainerAdjustment
		Error  string
	}
	r.check(json.Unmarshal(r.answers.Bytes(), &answer))
	if answer.Error != "" {
		r.Fatalf("the container is not created: %s", answer.Error)
	}
	return answer.Adjust
}

// waitAdjusted creates containers until one is adjusted, or none is any more.
func (r *nriRuntime) waitAdjusted(adjusted bool) (a *api.ContainerAdjustment) {
	r.Helper()
	what := map[bool]string{true: "a container is adjusted", false: "a container is let through as it is"}[adjusted]
	r.waitFor(what, func() bool {
		a = r.create("kata-checkpoint")
		return (len(a.GetMounts()) > 0) == adjusted
	})
	return a
}

// checkUnadjusted checks that containers are created though the plugin is away.
func (r *nriRuntime) checkUnadjusted() {
	r.Helper()
	if a := r.waitAdjusted(false); len(a.GetAnnotations()) > 0 {
		r.Errorf("without the plugin a container gets %v", a)
	}
}

// runningFrom lists the processes of a program.
func runningFrom(program string) []int {
	var out []int
	found, _ := filepath.Glob("/proc/[0-9]*/exe")
	for _, exe := range found {
		if target, err := os.Readlink(exe); err == nil && target == program {
			var pid int
			if err := json.Unmarshal([]byte(filepath.Base(filepath.Dir(exe))), &pid); err == nil {
				out = append(out, pid)
			}
		}
	}
	return out
}

// syncBuffer may be read while it is written.
type syncBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
