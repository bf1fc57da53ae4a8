// SPDX-License-Identifier: Apache-2.0

package fake

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/kata"
)

// Port is that of the agent in a Guest.
const Port = 10750

// Guest is a VM: its management socket, its VMM's hybrid vsock, and an agent
// that may be running or not.
type Guest struct {
	Management kata.Management

	// Exchange is the exchange directory by container id; Checkpoint writes there.
	Exchange func(id string) string

	mu        sync.Mutex
	there     bool
	protocol  uint32
	problems  []string
	server    *ttrpc.Server
	conns     chan net.Conn
	discarded []string
	calls     []string
	checks    int
	noPreDump bool
	requests  map[string]proto.Message
	tokens    map[string]string
	before    map[string]func(context.Context) error
	files     map[string]string
	// Connections are those that its checkpoints keep.
	Connections []*api.Connection
	// Rounds are how many bytes its next pre-dumps say that they have copied.
	Rounds []uint64
	// Fold changes the description of folded files.
	Fold func(*api.FoldedFiles)
	// Addresses are those of its network interfaces.
	Addresses []*api.Address
	// Sockets are those of the container with options that CRIU does not restore.
	Sockets []*api.Socket
	// Earlier: it is of a release that thaws no container at the end of a dump.
	Earlier bool
}

// NewGuest makes a guest with a running agent for a sandbox. With rust, its
// management socket is where Kata's Rust shim has it.
func NewGuest(t *testing.T, sandbox string, rust bool) *Guest {
	t.Helper()
	dir := t.TempDir()
	g := &Guest{
		Management: kata.Management{GoDir: filepath.Join(dir, "go"), RustDir: filepath.Join(dir, "rust")},
		there:      true,
		protocol:   api.ProtocolVersion,
		conns:      make(chan net.Conn),
		requests:   make(map[string]proto.Message),
		tokens:     make(map[string]string),
		before:     make(map[string]func(context.Context) error),
		files:      map[string]string{imageset.InventoryName: "inventory", "pages-1.img": strings.Repeat("p", 4096), imageset.DumpLogName: "log", imageset.StatsName: "stats"},
	}
	top := g.Management.GoDir
	if rust {
		top = g.Management.RustDir
	}
	if err := os.MkdirAll(filepath.Join(top, sandbox), 0o700); err != nil {
		t.Fatal(err)
	}
	vsock := filepath.Join(dir, "vsock")
	vmm, err := net.Listen("unix", vsock)
	if err != nil {
		t.Fatal(err)
	}
	management, err := net.Listen("unix", filepath.Join(top, sandbox, "shim-monitor.sock"))
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/agent-url", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintf(w, "hvsock://%s:1024", vsock) })
	web := &http.Server{Handler: mux, ReadHeaderTimeout: time.Minute}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = web.Serve(management) })
	wg.Go(func() { g.accept(ctx, vmm) })
	t.Cleanup(func() {
		cancel()
		web.Close()
		vmm.Close()
		g.SetThere(false)
		wg.Wait()
	})
	g.serve()
	return g
}

// SetThere starts or stops the agent.
func (g *Guest) SetThere(there bool) {
	g.mu.Lock()
	was, server := g.there, g.server
	g.there = there
	g.mu.Unlock()
	switch {
	case was && !there:
		server.Close()
	case !was && there:
		g.serve()
	}
}

// SetProtocol sets the agent's protocol version.
func (g *Guest) SetProtocol(v uint32) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.protocol = v
}

// SetProblems sets the reasons why no checkpoint works in the guest.
func (g *Guest) SetProblems(p ...string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.problems = p
}

// Before sets a function that runs first in a method of the agent, which fails
// with its error.
func (g *Guest) Before(method string, f func(context.Context) error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.before[method] = f
}

// Calls lists the agent's methods called so far, Info and Hold left out.
func (g *Guest) Calls() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return append([]string(nil), g.calls...)
}

// LosePreDump gives it a kernel that does not note which pages are written.
func (g *Guest) LosePreDump() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.noPreDump = true
}

// Checks is how often CRIU was to be loaded and checked.
func (g *Guest) Checks() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.checks
}

// Request returns the last request to a method of the agent.
func (g *Guest) Request(method string) proto.Message {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.requests[method]
}

// accept is the VMM's part: it accepts connections to the agent's port.
func (g *Guest) accept(ctx context.Context, l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		line, err := bufio.NewReaderSize(conn, 16).ReadString('\n')
		g.mu.Lock()
		there := g.there
		g.mu.Unlock()
		if err != nil || !there || strings.TrimSpace(line) != fmt.Sprintf("CONNECT %d", Port) {
			conn.Close()
			continue
		}
		if _, err := conn.Write([]byte("OK 1073741824\n")); err != nil {
			conn.Close()
			continue
		}
		select {
		case g.conns <- conn:
		case <-ctx.Done():
			conn.Close()
			return
		}
	}
}

// serve starts the agent.
func (g *Guest) serve() {
	server, err := ttrpc.NewServer()
	if err != nil {
		panic(err)
	}
	api.RegisterAgentService(server, g)
	l := &listener{conns: g.conns, done: make(chan struct{})}
	g.mu.Lock()
	g.server = server
	g.mu.Unlock()
	go func() { _ = server.Serve(context.Background(), l) }()
}

// listener returns connections that the VMM has accepted, and closes them with
// the agent, as if its process had exited.
type listener struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
	mu    sync.Mutex
	open  []net.Conn
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		l.mu.Lock()
		defer l.mu.Unlock()
		l.open = append(l.open, c)
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *listener) Close() error {
	l.once.Do(func() {
		close(l.done)
		l.mu.Lock()
		defer l.mu.Unlock()
		for _, c := range l.open {
			c.Close()
		}
	})
	return nil
}

func (l *listener) Addr() net.Addr { return &net.UnixAddr{} }

func (g *Guest) enter(ctx context.Context, method, id string, req proto.Message) error {
	g.mu.Lock()
	g.calls = append(g.calls, method+" "+id)
	g.requests[method] = proto.Clone(req)
	err := g.guard(req)
	g.mu.Unlock()
	if err != nil {
		return err
	}
	return g.runBefore(ctx, method)
}

// guard refuses a request without the token of its container's Adopt, as the agent
// does. The caller holds the mutex.
func (g *Guest) guard(req proto.Message) error {
	if adopt, ok := req.(*api.AdoptRequest); ok {
		if !adopt.GetGuarded() {
			return errdefs.ErrInvalidArgument.WithMessage("a container without a guard")
		}
		g.tokens[adopt.GetContainerId()] = adopt.GetToken()
		return nil
	}
	r := req.(interface {
		GetContainerId() string
		GetToken() string
	})
	if token, ok := g.tokens[r.GetContainerId()]; ok && token != r.GetToken() {
		return errdefs.ErrPermissionDenied.WithMessage("a request without the token of its container")
	}
	return nil
}

func (g *Guest) runBefore(ctx context.Context, method string) error {
	g.mu.Lock()
	f := g.before[method]
	g.mu.Unlock()
	if f == nil {
		return nil
	}
	return f(ctx)
}

// Info implements the agent.
func (g *Guest) Info(_ context.Context, r *api.InfoRequest) (*api.InfoResponse, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if r.GetCheck() {
		g.checks++
	}
	out := &api.InfoResponse{Protocol: g.protocol, Version: "fake", Processors: 1}
	if r.GetCheck() {
		out.Problems, out.PreDump = g.problems, !g.noPreDump
	}
	return out, nil
}

// Hold implements the agent.
func (g *Guest) Hold(ctx context.Context, _ *api.HoldRequest) (*emptypb.Empty, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// Adopt implements the agent.
func (g *Guest) Adopt(ctx context.Context, r *api.AdoptRequest) (*api.AdoptResponse, error) {
	return &api.AdoptResponse{Pid: 100}, g.enter(ctx, "Adopt", r.GetContainerId(), r)
}

// Forget implements the agent.
func (g *Guest) Forget(ctx context.Context, r *api.ContainerRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, g.enter(ctx, "Forget", r.GetContainerId(), r)
}

// Freeze implements the agent.
func (g *Guest) Freeze(ctx context.Context, r *api.ContainerRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, g.enter(ctx, "Freeze", r.GetContainerId(), r)
}

// Thaw implements the agent.
func (g *Guest) Thaw(ctx context.Context, r *api.ContainerRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, g.enter(ctx, "Thaw", r.GetContainerId(), r)
}

// Discard implements the agent. It is not among Calls: it may come at any time.
func (g *Guest) Discard(ctx context.Context, r *api.DiscardRequest) (*emptypb.Empty, error) {
	g.mu.Lock()
	g.discarded = append(g.discarded, r.GetDirectory())
	err := g.guard(r)
	g.mu.Unlock()
	if err != nil {
		return nil, err
	}
	if err := g.runBefore(ctx, "Discard"); err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, os.RemoveAll(filepath.Join(g.Exchange(r.GetContainerId()), r.GetDirectory()))
}

// Discarded returns the directories of the image sets that were discarded.
func (g *Guest) Discarded() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.discarded)
}

// CheckCheckpoint implements the agent.
func (g *Guest) CheckCheckpoint(ctx context.Context, r *api.CheckpointRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, g.enter(ctx, "CheckCheckpoint", r.GetContainerId(), r)
}

// PreDump implements the agent: it writes two pages in each round.
func (g *Guest) PreDump(ctx context.Context, r *api.PreDumpRequest) (*api.PreDumpResponse, error) {
	dir := filepath.Join(g.Exchange(r.GetContainerId()), r.GetDirectory())
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	if err := g.enter(ctx, "PreDump", r.GetContainerId(), r); err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	size := uint64(8 << 20)
	if len(g.Rounds) > 0 {
		size, g.Rounds = g.Rounds[0], g.Rounds[1:]
	}
	return &api.PreDumpResponse{Bytes: size}, os.WriteFile(filepath.Join(dir, "pages-1.img"), []byte(strings.Repeat("a", 4096)+strings.Repeat("b", 4096)), 0o600)
}

// Folded is what the images of a checkpoint with parents have in pages-1.img.
var Folded = strings.Repeat("b", 4096) + strings.Repeat("p", 4096)

// folded describes it.
func folded(parents []string) *api.FoldedFiles {
	return &api.FoldedFiles{Files: []*api.FoldedFile{{
		Name: "pages-1.img", SourceDirectories: []uint32{0, uint32(len(parents))}, SourceNames: []string{"pages-1.img", "pages-1.img"}, //nolint:gosec // few
		PartSources: []uint32{0, 1}, PartOffsets: []uint64{4096, 0}, PartSizes: []uint64{4096, 4096},
	}}}
}

// FailedLog is CRIU's log of a checkpoint or a restore that fails.
const FailedLog = "Error: failed"

// Checkpoint implements the agent: it writes a few files.
func (g *Guest) Checkpoint(ctx context.Context, r *api.CheckpointRequest) (*api.CheckpointResponse, error) {
	dir := filepath.Join(g.Exchange(r.GetContainerId()), r.GetDirectory())
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	if err := g.enter(ctx, "Checkpoint", r.GetContainerId(), r); err != nil {
		return nil, errclass.Join(err, os.WriteFile(filepath.Join(dir, imageset.DumpLogName), []byte(FailedLog), 0o600))
	}
	for name, content := range g.files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			return nil, err
		}
	}
	if parents := r.GetParents(); len(parents) > 0 {
		f := folded(parents)
		if g.Fold != nil {
			g.Fold(f)
		}
		data, err := proto.Marshal(f)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, api.FoldedName), data, 0o600)
		}
		if err != nil {
			return nil, err
		}
	}
	out := &api.CheckpointResponse{
		CriuVersion: 40201, KernelRelease: "6.1", Hostname: "host",
		Externals:  []*api.External{{Name: "m0", Destination: "/data", Fstype: "virtiofs"}},
		Stdio:      []*api.Stdio{{Fd: 1, Key: "pipe:[7]"}},
		OpenFiles:  []*api.OpenFile{{Path: []byte("/data/f"), Size: 5}},
		Addresses:  g.Addresses,
		Sockets:    g.Sockets,
		Attributes: []*api.Attribute{{Pid: 1, Name: "cpus", Value: "0"}},
		Phases:     []*api.Phase{{Name: "criu dump", Nanoseconds: 1000}},

		TcpEstablished: len(g.Connections) > 0, Connections: g.Connections, Thawed: r.GetThaw() && !g.Earlier,
	}
	if out.Thawed {
		g.mu.Lock()
		g.calls = append(g.calls, "Thaw "+r.GetContainerId())
		g.mu.Unlock()
		out.Phases = append(out.Phases, &api.Phase{Name: "thaw", Nanoseconds: 1000})
	}
	return out, nil
}

// CheckRestore implements the agent.
func (g *Guest) CheckRestore(ctx context.Context, r *api.RestoreRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, g.enter(ctx, "CheckRestore", r.GetContainerId(), r)
}

// Restore implements the agent.
func (g *Guest) Restore(ctx context.Context, r *api.RestoreRequest) (*api.RestoreResponse, error) {
	if err := g.enter(ctx, "Restore", r.GetContainerId(), r); err != nil {
		path := filepath.Join(g.Exchange(r.GetContainerId()), r.GetDirectory()+api.LogSuffix)
		return nil, errclass.Join(err, os.WriteFile(path, []byte(FailedLog), 0o600))
	}
	return &api.RestoreResponse{Pid: 101, Phases: []*api.Phase{{Name: "criu restore", Nanoseconds: 1}}}, nil
}

// Exec implements the agent.
func (g *Guest) Exec(ctx context.Context, r *api.ExecRequest) (*api.ExecResponse, error) {
	return &api.ExecResponse{Pid: 102}, g.enter(ctx, "Exec", r.GetContainerId(), r)
}

// Signal implements the agent.
func (g *Guest) Signal(ctx context.Context, r *api.SignalRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, g.enter(ctx, "Signal", r.GetContainerId(), r)
}
