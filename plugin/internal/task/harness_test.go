// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/pkg/shutdown"
	"github.com/containerd/ttrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/internal/adjust"
	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/config"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/fake"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/kata"
)

// waitLimit is for what is to happen at once.
const waitLimit = 20 * time.Second

// harness is a service between a client, as containerd is one, and fakes.
type harness struct {
	t      *testing.T
	cfg    *config.Config
	kata   *fake.Kata
	guest  *fake.Guest
	events *recorder
	down   shutdown.Service
	// service is what the client reaches.
	service *Service
	conn    *ttrpc.Client
	// task is what containerd has.
	task task.TTRPCTaskService
	// unlinked is closed when the sockets are to be removed.
	unlinked chan struct{}
	path     string // of the shim's socket
	// protected are the calls that Kata has had each time when its share was
	// protected.
	protected [][]string
	share     *sharing
	// virtiofsd is a pidfd of what serves the VM's files, or nil.
	virtiofsd *os.File
}

// sharing is what the guest's mounts of its exchange directory are on the host.
type sharing struct {
	mu       sync.Mutex
	writable bool
	// busy: the guest has files open for writing.
	busy bool
	// changes is how often the guest was let write.
	changes int
}

func (s *sharing) set(_ string, writable bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !writable && s.busy {
		return fmt.Errorf("mount: %w", kata.ErrInUse)
	}
	if writable {
		s.changes++
	}
	s.writable = writable
	return nil
}

func (s *sharing) setBusy(busy bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.busy = busy
}

func (s *sharing) isWritable() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.writable
}

type option func(*harness)

func withConfig(change func(*config.Config)) option { return func(h *harness) { change(h.cfg) } }

func withRust(h *harness) { h.guest = fake.NewGuest(h.t, "c1", true) }

func withoutAgent(h *harness) { h.guest.SetThere(false) }

// withoutWait is for a test in which an agent does not come.
func withoutWait(h *harness) { h.cfg.AgentTimeout = 300 * time.Millisecond }

func newHarness(t *testing.T, options ...option) *harness {
	t.Helper()
	dir := t.TempDir()
	bundle := filepath.Join(dir, "guest")
	if err := os.MkdirAll(filepath.Join(bundle, "bin"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(bundle, api.AgentBinary), nil, 0o700); err != nil {
		t.Fatal(err)
	}
	h := &harness{
		t: t,
		cfg: &config.Config{
			StateDir: filepath.Join(dir, "state"), SigningKey: filepath.Join(dir, "state", "key.pem"), GuestBundle: bundle, AgentPort: fake.Port,
			AgentTimeout: waitLimit, FreezeTimeout: waitLimit, CheckpointTimeout: waitLimit, ExecWaitTimeout: waitLimit,
			AfterCheckpoint: annotations.Stop, AfterCheckpointCRI: annotations.LeaveRunning, MaxImageFiles: 100, MaxImageBytes: 1 << 20,
		},
		kata:     fake.NewKata(t),
		guest:    fake.NewGuest(t, "c1", false),
		events:   &recorder{hidden: map[string]bool{}},
		unlinked: make(chan struct{}),
		share:    &sharing{writable: true},
	}
	for _, o := range options {
		o(h)
	}
	h.guest.Exchange = func(id string) string { return adjust.ExchangeDir(h.cfg.StateDir, "ns", id) }
	ctx, sd := shutdown.WithShutdown(context.Background())
	h.down = sd
	var once sync.Once
	s, err := New(ctx, Options{
		Config: h.cfg, Namespace: "ns", Sandbox: "c1", Downstream: h.kata.Endpoint, Management: h.guest.Management,
		Events: h.events, Shutdown: sd, Unlink: func() { once.Do(func() { close(h.unlinked) }) },
		EndKata:      func() error { h.kata.Die(); return nil },
		ProtectShare: func() error { h.protected = append(h.protected, h.kata.Calls()); return nil },
		SetWritable:  h.share.set,
		Virtiofsd:    func() (*os.File, error) { return h.virtiofsd, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	h.service = s
	server, err := ttrpc.NewServer(ttrpc.WithServerHandshaker(s.Handshaker(ttrpc.UnixSocketRequireSameUser())))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.RegisterTTRPC(server); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "shim.sock")
	fake.Serve(t, server, path)
	h.path = path
	h.connect()
	t.Cleanup(func() {
		h.conn.Close()
		sd.Shutdown()
		<-sd.Done()
	})
	return h
}

// connect is what containerd does when it starts, for the first time or again.
func (h *harness) connect() {
	h.t.Helper()
	conn, err := net.Dial("unix", h.path)
	if err != nil {
		h.t.Fatal(err)
	}
	h.conn = ttrpc.NewClient(conn)
	h.task = task.NewTTRPCTaskClient(h.conn)
}

// bundle makes a bundle with a spec.
func (h *harness) bundle(change func(*specs.Spec)) string {
	h.t.Helper()
	spec := &specs.Spec{
		Version:     "1.3.0",
		Process:     &specs.Process{Args: []string{"sh", "-c", "work"}, Cwd: "/work", User: specs.User{UID: 1000}, NoNewPrivileges: true, Capabilities: &specs.LinuxCapabilities{Bounding: []string{"CAP_CHOWN"}}},
		Mounts:      []specs.Mount{{Destination: "/proc", Type: "proc", Source: "proc"}, {Destination: "/data", Type: "bind", Source: "/x", Options: []string{"rbind"}}},
		Annotations: map[string]string{},
	}
	if change != nil {
		change(spec)
	}
	dir := h.t.TempDir()
	data, err := json.Marshal(spec)
	if err != nil {
		h.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), data, 0o600); err != nil {
		h.t.Fatal(err)
	}
	return dir
}

func readSpec(t *testing.T, dir string) *specs.Spec {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(dir, "config.json"))
	if err != nil {
		t.Fatal(err)
	}
	spec := &specs.Spec{}
	if err := json.Unmarshal(data, spec); err != nil {
		t.Fatal(err)
	}
	return spec
}

// create creates the container c1 and returns its bundle.
func (h *harness) create(change func(*specs.Spec), requests ...func(*task.CreateTaskRequest)) string {
	h.t.Helper()
	dir := h.bundle(change)
	r := &task.CreateTaskRequest{ID: "c1", Bundle: dir}
	for _, change := range requests {
		change(r)
	}
	if _, err := h.task.Create(h.t.Context(), r); err != nil {
		h.t.Fatal(err)
	}
	return dir
}

// run creates and starts the container c1.
func (h *harness) run(change func(*specs.Spec)) string {
	h.t.Helper()
	dir := h.create(change)
	if _, err := h.task.Start(h.t.Context(), &task.StartRequest{ID: "c1"}); err != nil {
		h.t.Fatal(err)
	}
	return dir
}

func (h *harness) pause() {
	h.t.Helper()
	if _, err := h.task.Pause(h.t.Context(), &task.PauseRequest{ID: "c1"}); err != nil {
		h.t.Fatal(err)
	}
}

func (h *harness) status() string {
	h.t.Helper()
	st, err := h.task.State(h.t.Context(), &task.StateRequest{ID: "c1"})
	if err != nil {
		h.t.Fatal(err)
	}
	return st.GetStatus().String()
}

// wantStatus may be called beside the test.
func (h *harness) wantStatus(want string) {
	h.t.Helper()
	st, err := h.task.State(h.t.Context(), &task.StateRequest{ID: "c1"})
	if err != nil || st.GetStatus().String() != want {
		h.t.Errorf("State reports %s (%v), want %s", st.GetStatus(), err, want)
	}
}

func (h *harness) exchange() string { return h.guest.Exchange("c1") }

// eventually waits for a condition.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), waitLimit)
	defer cancel()
	for !ok() {
		select {
		case <-time.After(time.Millisecond):
		case <-ctx.Done():
			t.Fatalf("%s: not within %s", what, waitLimit)
		}
	}
}

func (h *harness) wantCalls(who string, got []string, want ...string) {
	h.t.Helper()
	if !slices.Equal(got, want) {
		h.t.Errorf("calls to %s: %q, want %q", who, got, want)
	}
}

func wantError(t *testing.T, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want one with %q", parts)
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("error %q lacks %q", err, p)
		}
	}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// recorder stands in for the relay.
type recorder struct {
	mu     sync.Mutex
	topics []string
	hidden map[string]bool
	onExit func(container, exec string)
}

func (r *recorder) Publish(_ context.Context, topic string, _ events.Event) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.topics = append(r.topics, topic)
	return nil
}

func (r *recorder) OnExit(f func(container, exec string)) { r.onExit = f }

func (r *recorder) Hide(id string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.hidden[id] = true
	return true
}

func (r *recorder) Expect(string, string) {}
func (r *recorder) Forget(string)         {}

func (r *recorder) published() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.topics)
}
