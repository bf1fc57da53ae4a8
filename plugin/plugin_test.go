// SPDX-License-Identifier: Apache-2.0

package plugin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v2"
	taskv3 "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/kata-checkpoint/kata-checkpoint/internal/adjust"
	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
	"github.com/kata-checkpoint/kata-checkpoint/internal/procfs"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/bundle"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/fake"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/manager"
)

// These tests run whole processes, as containerd does. The test's own binary is
// the shim, when the environment says so, and Kata's shim under Kata's name.
const (
	roleEnv    = "TEST_SHIM"
	socketsEnv = "TEST_SHIM_SOCKETS"
	// kataEnv says how Kata's shim behaves.
	kataEnv  = "TEST_KATA"
	kataName = "containerd-shim-kata-v2"
)

func TestMain(m *testing.M) {
	switch {
	case filepath.Base(os.Args[0]) == kataName:
		kataMain()
	case os.Getenv(roleEnv) != "":
		i, err := manager.Parse(os.Args[1:])
		if err == nil {
			i.SocketDir = os.Getenv(socketsEnv)
			err = run(context.Background(), i, os.Stdout)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	default:
		os.Exit(m.Run())
	}
}

func fatal(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// kataMain is a shim with Kata's ways of answering.
func kataMain() {
	mode := os.Getenv(kataEnv)
	arg := func(name string) string {
		for i, a := range os.Args {
			if a == name && i+1 < len(os.Args) {
				return os.Args[i+1]
			}
		}
		return ""
	}
	switch action := os.Args[len(os.Args)-1]; action {
	case "-info":
		out, err := proto.Marshal(&types.RuntimeInfo{Name: "io.containerd.kata.v2", Version: &types.RuntimeVersion{Version: "4.1.0"}, Annotations: map[string]string{"containerd.io/runtime-allow-mounts": "mkdir/*"}})
		fatal(err)
		os.Stdout.Write(out)
	case "start":
		fmt.Fprintln(os.Stderr, "level=warning msg=\"noise that is no answer\"")
		switch mode {
		case "fails":
			fatal(errors.New("no hypervisor"))
		case "fails as Rust":
			fmt.Fprintln(os.Stderr, "no hypervisor")
			return
		case "says nothing":
			return
		case "prints rubbish":
			fmt.Println("rubbish")
			return
		case "lies":
			fmt.Println("unix:///no/such/socket")
			return
		}
		if !strings.HasSuffix(arg("-address"), ".kata-checkpoint") {
			fatal(fmt.Errorf("address %q would collide", arg("-address")))
		}
		socket, err := filepath.Abs("kata.sock")
		fatal(err)
		if spec, err := bundle.ReadSpec("."); err == nil {
			if kind, _, err := annotations.Place(arg("-id"), spec.Annotations); err == nil && kind == annotations.InPod {
				fmt.Print("unix://" + socket)
				return
			}
		}
		os.Remove(socket)
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
		fatal(err)
		l.SetUnlinkOnClose(false)
		f, err := l.File()
		fatal(err)
		cmd := exec.Command(os.Args[0], "serve")
		cmd.ExtraFiles = []*os.File{f}
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		fatal(cmd.Start())
		fatal(os.WriteFile("shim.pid", []byte(strconv.Itoa(cmd.Process.Pid)), 0o600))
		fatal(os.WriteFile("address", []byte("unix://"+socket), 0o600))
		if mode == "prints rubbish and stays" {
			fmt.Println("rubbish")
			return
		}
		fmt.Print("unix://" + socket)
	case "serve":
		l, err := net.FileListener(os.NewFile(3, "socket"))
		fatal(err)
		server, err := ttrpc.NewServer()
		fatal(err)
		k := fake.NewTasks()
		k.Before("Shutdown", func(context.Context) error {
			if mode == "does not shut down" {
				return nil
			}
			os.Exit(0)
			return nil
		})
		task.RegisterTTRPCTaskService(server, k)
		fatal(server.Serve(context.Background(), l))
	case "delete":
		switch mode {
		case "fails":
			fatal(errors.New("nothing to delete"))
		case "fails as Rust":
			fmt.Fprintln(os.Stderr, "nothing to delete")
			return
		}
		out, err := proto.Marshal(&task.DeleteResponse{ExitStatus: 42, ExitedAt: timestamppb.New(time.Unix(1, 0))})
		fatal(err)
		os.Stdout.Write(out)
	}
}

// node is a machine with containerd's part played by the test.
type node struct {
	t       *testing.T
	dir     string
	env     []string
	sockets string
	state   string
}

func newNode(t *testing.T, mode string) *node {
	t.Helper()
	// Short: the path of a socket has 107 characters at most.
	dir, err := os.MkdirTemp("", "kc")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	n := &node{t: t, dir: dir, sockets: filepath.Join(dir, "s"), state: filepath.Join(dir, "state")}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(self, filepath.Join(dir, kataName)); err != nil {
		t.Fatal(err)
	}
	n.configure(fmt.Sprintf("downstream_shim = %q\nstate_dir = %q\n", filepath.Join(dir, kataName), n.state))
	// A binary with the race detector sleeps for a second when it ends, if it may.
	n.env = append(os.Environ(), "GORACE=atexit_sleep_ms=0", roleEnv+"=1", socketsEnv+"="+n.sockets, kataEnv+"="+mode, "KATA_CHECKPOINT_CONFIG="+n.config(), "TTRPC_ADDRESS="+filepath.Join(dir, "c.ttrpc"), "XDG_RUNTIME_DIR=", "TMPDIR="+dir)
	t.Cleanup(n.cleanup)
	return n
}

func (n *node) config() string { return filepath.Join(n.dir, "config.toml") }

func (n *node) configure(content string) {
	n.t.Helper()
	if err := os.WriteFile(n.config(), []byte(content), 0o600); err != nil {
		n.t.Fatal(err)
	}
}

// set changes how Kata's shim behaves.
func (n *node) set(mode string) { n.env = append(n.env, kataEnv+"="+mode) }

func (n *node) bundle(id string, annotations map[string]string) string {
	n.t.Helper()
	dir := filepath.Join(n.dir, "bundles", id)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		n.t.Fatal(err)
	}
	data, err := json.Marshal(map[string]any{"ociVersion": "1.3.0", "annotations": annotations})
	if err != nil {
		n.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), data, 0o600); err != nil {
		n.t.Fatal(err)
	}
	return dir
}

// shim runs the binary as containerd does.
func (n *node) shim(dir string, args ...string) (stdout, stderr string, err error) {
	n.t.Helper()
	self, err := os.Executable()
	if err != nil {
		n.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(n.t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, self, args...)
	var out, errs bytes.Buffer
	cmd.Dir, cmd.Env, cmd.Stdout, cmd.Stderr = dir, n.env, &out, &errs
	err = cmd.Run()
	return out.String(), errs.String(), err
}

func flags(id, action string) []string {
	return []string{"-namespace", "ns", "-address", "/run/containerd/containerd.sock", "-publish-binary", "containerd", "-id", id, action}
}

func (n *node) start(dir string) (stdout, stderr string, err error) {
	return n.shim(dir, flags(filepath.Base(dir), "start")...)
}

func (n *node) mustStart(dir string) string {
	n.t.Helper()
	out, errs, err := n.start(dir)
	if err != nil || errs != "" {
		n.t.Fatalf("start: %v, stderr %q", err, errs)
	}
	var answer struct {
		Version           int
		Address, Protocol string
	}
	if err := json.Unmarshal([]byte(out), &answer); err != nil || answer.Version != 2 || answer.Protocol != "ttrpc" {
		n.t.Fatalf("start says %q: %v", out, err)
	}
	return answer.Address
}

func (n *node) delete(dir string) *task.DeleteResponse {
	n.t.Helper()
	out, errs, err := n.shim(dir, flags(filepath.Base(dir), "delete")...)
	if err != nil {
		n.t.Fatalf("delete: %v, stderr %q", err, errs)
	}
	resp := &task.DeleteResponse{}
	if err := proto.Unmarshal([]byte(out), resp); err != nil {
		n.t.Fatal(err)
	}
	return resp
}

func (n *node) dial(address string) *ttrpc.Client {
	n.t.Helper()
	conn, err := net.Dial("unix", strings.TrimPrefix(address, "unix://"))
	if err != nil {
		n.t.Fatal(err)
	}
	c := ttrpc.NewClient(conn)
	n.t.Cleanup(func() { c.Close() })
	return c
}

// processes are those whose working directory is in a bundle: both daemons.
func (n *node) processes() map[int]string {
	out := make(map[int]string)
	entries, err := os.ReadDir("/proc")
	if err != nil {
		n.t.Fatal(err)
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		cwd, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", pid))
		if err != nil || !strings.HasPrefix(cwd, filepath.Join(n.dir, "bundles")) {
			continue
		}
		if st, err := procfs.ReadStat(pid); err == nil && !st.Exited() {
			args, _ := procfs.Cmdline(pid)
			out[pid] = strings.Join(args, " ")
		}
	}
	return out
}

func (n *node) cleanup() {
	for pid := range n.processes() {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
}

// wantNothing checks that no process and no socket is left, as soon as they
// have had the time to go.
func (n *node) wantNothing() {
	n.t.Helper()
	var what any
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); {
		left := n.processes()
		sockets, err := os.ReadDir(n.sockets)
		if len(left) == 0 && (errors.Is(err, fs.ErrNotExist) || len(sockets) == 0) {
			return
		}
		what = fmt.Sprint(left, sockets)
		time.Sleep(5 * time.Millisecond) //nolint:forbidigo // the pause between two checks
	}
	n.t.Errorf("left over: %s", what)
}

func (n *node) record(dir string) *bundle.Record {
	n.t.Helper()
	r, err := bundle.ReadRecord(dir)
	if err != nil {
		n.t.Fatal(err)
	}
	return r
}

func TestStartServeShutdown(t *testing.T) {
	n := newNode(t, "")
	dir := n.bundle("c1", nil)
	address := n.mustStart(dir)
	if len(n.processes()) != 2 {
		t.Errorf("processes %v", n.processes())
	}
	// Kata's own files are Kata's.
	for name, want := range map[string]string{"address": "unix://" + filepath.Join(dir, "kata.sock"), "shim.pid": ""} {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil || want != "" && string(data) != want {
			t.Errorf("%s: %q, %v", name, data, err)
		}
	}
	r := n.record(dir)
	if r.PID == 0 || r.Address != address || r.Sandbox != "c1" || r.StateDir != n.state {
		t.Errorf("record %+v", r)
	}
	client := n.dial(address)
	resp, err := task.NewTTRPCTaskClient(client).Connect(t.Context(), &task.ConnectRequest{ID: "c1"})
	if err != nil || resp.GetTaskPid() != fake.HypervisorPID {
		t.Errorf("Connect: %v, %v", resp, err)
	}
	if _, err := taskv3.NewTTRPCTaskClient(client).Connect(t.Context(), &taskv3.ConnectRequest{ID: "c1"}); err != nil {
		t.Errorf("Connect by the newer name: %v", err)
	}
	if _, err := task.NewTTRPCTaskClient(client).Shutdown(t.Context(), &task.ShutdownRequest{ID: "c1"}); err != nil {
		t.Errorf("Shutdown: %v", err)
	}
	// A container of the same name can come at once.
	n.mustStart(n.bundle("c1", nil))
}

func TestStartOfAPod(t *testing.T) {
	n := newNode(t, "")
	sandbox := n.bundle("sb", map[string]string{"io.kubernetes.cri.container-type": "sandbox"})
	address := n.mustStart(sandbox)
	before := len(n.processes())
	for _, annotations := range []map[string]string{
		{"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "sb"},
		{"io.kubernetes.cri-o.ContainerType": "container", "io.kubernetes.cri-o.SandboxID": "sb"},
	} {
		dir := n.bundle("c1", annotations)
		if got := n.mustStart(dir); got != address {
			t.Errorf("address %q, the sandbox's is %q", got, address)
		}
		if r := n.record(dir); r.PID != 0 || r.Sandbox != "sb" {
			t.Errorf("record %+v", r)
		}
		if len(n.processes()) != before {
			t.Errorf("processes %v", n.processes())
		}
		// One of its containers goes, by force or not; the pod stays.
		if got := n.delete(dir); got.GetExitStatus() != 137 { // Kata's delete is not asked: the name may be another's by now
			t.Errorf("delete %v", got)
		}
		if len(n.processes()) != before {
			t.Errorf("processes after delete %v", n.processes())
		}
	}
	if _, err := task.NewTTRPCTaskClient(n.dial(address)).Connect(t.Context(), &task.ConnectRequest{ID: "sb"}); err != nil {
		t.Error(err)
	}
	n.delete(sandbox)
	n.wantNothing()
}

func TestStartFailsAndLeavesNothing(t *testing.T) {
	for name, tc := range map[string]struct {
		mode    string
		prepare func(n *node, dir string)
		want    []string
	}{
		"a bundle without config.json": {prepare: func(_ *node, dir string) { os.Remove(filepath.Join(dir, "config.json")) }, want: []string{"has no config.json"}},
		"a truncated config.json":      {prepare: func(_ *node, dir string) { _ = os.Truncate(filepath.Join(dir, "config.json"), 1) }, want: []string{"not an OCI runtime spec"}},
		"an unknown key":               {prepare: func(n *node, _ string) { n.configure("downstream = 1") }, want: []string{"config.toml", "line 1", "downstream"}},
		"a config.toml that is XML":    {prepare: func(n *node, _ string) { n.configure("<xml/>") }, want: []string{"config.toml", "not TOML"}},
		"no downstream shim":           {prepare: func(n *node, _ string) { n.configure(`downstream_shim = "/no/such/shim"`) }, want: []string{"/no/such/shim", "downstream_shim"}},
		"one that fails":               {mode: "fails", want: []string{"start Kata's shim", "no hypervisor"}},
		"one that fails as Rust does":  {mode: "fails as Rust", want: []string{"no answer", "no hypervisor"}},
		"one that says nothing":        {mode: "says nothing", want: []string{"no answer"}},
		"one that prints rubbish":      {mode: "prints rubbish", want: []string{`"rubbish"`, "downstream_shim"}},
		"one that stays nevertheless":  {mode: "prints rubbish and stays", want: []string{`"rubbish"`}},
		"one that lies":                {mode: "lies", want: []string{"start the daemon", "/no/such/socket"}},
		"a pod container without pod": {prepare: func(n *node, _ string) {
			n.bundle("c1", map[string]string{"io.kubernetes.cri.container-type": "container"})
		}, want: []string{"sandbox-id"}},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, tc.mode)
			dir := n.bundle("c1", nil)
			if tc.prepare != nil {
				tc.prepare(n, dir)
			}
			out, errs, err := n.start(dir)
			if err == nil || out != "" {
				t.Fatalf("start says %q, %v", out, err)
			}
			for _, part := range tc.want {
				if !strings.Contains(errs, part) {
					t.Errorf("%q lacks %q", errs, part)
				}
			}
			n.wantNothing()
			if _, err := os.Stat(filepath.Join(dir, bundle.RecordName)); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the record is left: %v", err)
			}
		})
	}
}

func TestStartByOthers(t *testing.T) {
	n := newNode(t, "")
	dir := n.bundle("c1", nil)
	for _, args := range [][]string{{"start"}, {"-namespace", "ns", "start"}, {"-namespace", "../x", "-id", "c1", "start"}, {"-namespace", "ns", "-id", "a/b", "start"}, {"-nonsense"}, {"-namespace", "ns", "-id", "c1", "dance"}} {
		if out, errs, err := n.shim(dir, args...); err == nil || out != "" || !strings.Contains(errs, "containerd") {
			t.Errorf("%q: %q, %q, %v", args, out, errs, err)
		}
	}
	n.wantNothing()
}

// Whatever was killed, containerd calls delete, and nothing is left after it.
func TestDelete(t *testing.T) {
	kill := func(n *node, pid int) {
		n.t.Helper()
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			n.t.Fatal(err)
		}
	}
	kataPID := func(n *node, dir string) int {
		data, err := os.ReadFile(filepath.Join(dir, "shim.pid"))
		if err != nil {
			n.t.Fatal(err)
		}
		pid, err := strconv.Atoi(string(data))
		if err != nil {
			n.t.Fatal(err)
		}
		return pid
	}
	for name, tc := range map[string]struct {
		mode    string
		prepare func(n *node, dir string)
		status  uint32
	}{
		"both alive":                      {prepare: func(*node, string) {}, status: 42},
		"our daemon killed":               {prepare: func(n *node, dir string) { kill(n, n.record(dir).PID) }, status: 42},
		"our daemon killed, Kata's stays": {mode: "does not shut down", prepare: func(n *node, dir string) { kill(n, n.record(dir).PID) }, status: 42},
		"Kata's shim killed":              {prepare: func(n *node, dir string) { kill(n, kataPID(n, dir)) }, status: 42},
		"both killed":                     {prepare: func(n *node, dir string) { kill(n, n.record(dir).PID); kill(n, kataPID(n, dir)) }, status: 42},
		"Kata's delete fails":             {prepare: func(n *node, _ string) { n.set("fails") }, status: 137},
		"Kata's delete fails as Rust's":   {prepare: func(n *node, _ string) { n.set("fails as Rust") }, status: 137},
		"Kata's shim is uninstalled":      {prepare: func(n *node, _ string) { os.Remove(filepath.Join(n.dir, kataName)) }, status: 137},
		"config.toml is broken meanwhile": {prepare: func(n *node, _ string) { n.configure("<xml/>") }, status: 42},
		"the record is gone": {prepare: func(n *node, dir string) {
			kill(n, n.record(dir).PID)
			os.Remove(filepath.Join(dir, bundle.RecordName))
			kill(n, kataPID(n, dir))
		}, status: 42},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, tc.mode)
			dir := n.bundle("c1", nil)
			begin := time.Now()
			n.mustStart(dir)
			started := time.Since(begin) // a measure of the machine
			exchange := adjust.ExchangeDir(n.state, "ns", "c1")
			unfinished := filepath.Join(t.TempDir(), ".kata-checkpoint-0123456789abcdef")
			bootstrap := filepath.Join(n.state, "bootstrap", "ns--c1--x")
			unpacked := filepath.Join(n.dir, "ctrd-checkpoint0123")
			for _, d := range []string{exchange, unfinished, bootstrap, unpacked} {
				if err := os.MkdirAll(d, 0o700); err != nil {
					t.Fatal(err)
				}
			}
			if err := errors.Join(bundle.SetUnfinished(n.state, "ns", "c1", unfinished), bundle.SetTemporary(dir, unpacked)); err != nil {
				t.Fatal(err)
			}
			socket := n.record(dir).Downstream.Path()
			tc.prepare(n, dir)
			_, noRecord := os.Stat(filepath.Join(dir, bundle.RecordName))
			begin = time.Now()
			resp := n.delete(dir)
			if d := time.Since(begin); d > 4*time.Second+started {
				t.Errorf("it took %s; containerd gives it 5 s", d)
			}
			if resp.GetExitStatus() != tc.status || resp.GetExitedAt() == nil {
				t.Errorf("answer %v", resp)
			}
			n.wantNothing()
			left := []string{exchange, unfinished, filepath.Join(bundle.UnfinishedDir(n.state), "ns--c1"), bootstrap, unpacked}
			if noRecord == nil {
				left = append(left, socket) // Kata's Rust shim does not start where there is one
			}
			for _, d := range left {
				if _, err := os.Lstat(d); !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("%s is left: %v", d, err)
				}
			}
		})
	}
	t.Run("a pid that is another's by now", func(t *testing.T) {
		n := newNode(t, "")
		dir := n.bundle("c1", nil)
		n.mustStart(dir)
		r := n.record(dir)
		other := exec.Command("sleep", "60")
		if err := other.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() {
			_ = other.Process.Kill()
			_ = other.Wait()
		}()
		kill(n, r.PID)
		r.PID = other.Process.Pid
		if err := errors.Join(r.Write(dir), os.WriteFile(filepath.Join(dir, "shim.pid"), []byte(strconv.Itoa(other.Process.Pid)), 0o600)); err != nil {
			t.Fatal(err)
		}
		n.delete(dir)
		if err := syscall.Kill(other.Process.Pid, 0); err != nil {
			t.Errorf("it was killed: %v", err)
		}
		n.cleanup()
	})
}

// containerd takes the end of the connection for the end of the shim, so it
// has to end.
func TestDaemonEndsWithKatas(t *testing.T) {
	n := newNode(t, "")
	dir := n.bundle("c1", nil)
	client := n.dial(n.mustStart(dir))
	data, err := os.ReadFile(filepath.Join(dir, "shim.pid"))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(string(data))
	if err != nil {
		t.Fatal(err)
	}
	waited := make(chan error, 1)
	go func() {
		_, err := task.NewTTRPCTaskClient(client).Wait(context.Background(), &task.WaitRequest{ID: "c1"})
		waited <- err
	}()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := <-waited; !errors.Is(err, ttrpc.ErrClosed) {
		t.Errorf("Wait: %v", err)
	}
	n.wantNothing()
}

func TestDaemonIsTold(t *testing.T) {
	n := newNode(t, "")
	dir := n.bundle("c1", nil)
	n.mustStart(dir)
	if err := syscall.Kill(n.record(dir).PID, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(20 * time.Second); len(n.processes()) > 1; {
		if time.Now().After(deadline) {
			t.Fatalf("processes %v", n.processes())
		}
		time.Sleep(5 * time.Millisecond) //nolint:forbidigo // the pause between two checks
	}
	n.delete(dir)
	n.wantNothing()
}

func TestInfo(t *testing.T) {
	n := newNode(t, "")
	out, errs, err := n.shim(t.TempDir(), "-info")
	if err != nil || errs != "" {
		t.Fatalf("%v, %q", err, errs)
	}
	info := &types.RuntimeInfo{}
	if err := proto.Unmarshal([]byte(out), info); err != nil {
		t.Fatal(err)
	}
	if info.GetName() != "io.containerd.kata-checkpoint.v2" || info.GetVersion().GetVersion() != "4.1.0" || info.GetAnnotations()["containerd.io/runtime-allow-mounts"] != "mkdir/*" {
		t.Errorf("%v", info)
	}
	n.configure(`downstream_shim = "/bin/true"`)
	if out, errs, err = n.shim(t.TempDir(), "-info"); err == nil || out != "" || !strings.Contains(errs, "downstream_shim") {
		t.Errorf("%q, %q, %v", out, errs, err)
	}
	if out, _, err = n.shim(t.TempDir(), "-v"); err != nil || !strings.HasPrefix(out, "containerd-shim-kata-checkpoint-v2 ") {
		t.Errorf("%q, %v", out, err)
	}
}
