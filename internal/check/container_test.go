// SPDX-License-Identifier: Apache-2.0

package check

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	cgroup2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	tasks "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/version"
)

// metrics is containerd's task service with one container.
type metrics struct {
	tasks.UnimplementedTasksServer
	memory *cgroup2.MemoryStat
	guest  *guest
}

func (m *metrics) Metrics(_ context.Context, r *tasks.MetricsRequest) (*tasks.MetricsResponse, error) {
	if !slices.Equal(r.GetFilters(), []string{"id==abcdef"}) {
		return nil, errdefs.ErrInvalidArgument
	}
	data, err := typeurl.MarshalAnyToProto(&cgroup2.Metrics{Memory: m.memory})
	return &tasks.MetricsResponse{Metrics: []*types.Metric{{Data: data}}}, err
}

// shim answers as the one of the container abcdef does.
type shim struct {
	answer *api.CheckResponse
	err    error
}

func (s *shim) Check(_ context.Context, r *api.CheckRequest) (*api.CheckResponse, error) {
	if id := r.GetContainerId(); id != "abcdef" && !strings.HasPrefix(id, guestNamespace) {
		return nil, status.Error(codes.NotFound, "no such container")
	}
	return s.answer, s.err
}

// container makes a container of namespace ns, whose shim answers.
func (n *node) container(id string, s *shim) { n.containerIn("ns", id, s) }

func (n *node) containerIn(namespace, id string, s *shim) {
	n.t.Helper()
	// A socket's path is limited to 107 bytes, and those of tests are long.
	dir, err := os.MkdirTemp("", "check-")
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { os.RemoveAll(dir) })
	socket := filepath.Join(dir, "s")
	n.write("run/io.containerd.runtime.v2.task/"+namespace+"/"+id+"/bootstrap.json", fmt.Sprintf(`{"version":2,"address":"unix://%s","protocol":"ttrpc"}`, socket), 0o644)
	if s == nil {
		return
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		n.t.Fatal(err)
	}
	server, err := ttrpc.NewServer()
	if err != nil {
		n.t.Fatal(err)
	}
	api.RegisterShimService(server, s)
	go func() { _ = server.Serve(context.Background(), l) }()
	n.t.Cleanup(func() { server.Close() })
}

// goodAnswer is that of the shim of a container that can be checkpointed.
func goodAnswer() *api.CheckResponse {
	return &api.CheckResponse{State: "running", AgentVersion: version.Version, ShimVersion: version.Version, CriuVersion: 40201, KernelRelease: "6.18.35"}
}

// containerFault is something about a container, and what is said of it.
type containerFault struct {
	id, namespace string
	change        func(*node, *shim)
	level         Level
	words         []string
}

func containerFaults() map[string]containerFault {
	return map[string]containerFault{
		"all is well":                {"abcdef", "", func(*node, *shim) {}, OK, []string{"abcdef in namespace ns is running", "CRIU 4.2.1, Linux 6.18.35", "can be checkpointed now, and keeps running", "about 24.0 MiB"}},
		"by the beginning of its ID": {"abc", "ns", func(*node, *shim) {}, OK, []string{"abcdef in namespace ns"}},
		"it is stopped by it":        {"abcdef", "", func(_ *node, s *shim) { s.answer.Stops = true }, OK, []string{"is stopped by it"}},
		"all reasons": {
			"abcdef", "", func(_ *node, s *shim) { s.answer.Reasons = []string{"a kernel is missing", "it uses io_uring"} }, Error,
			[]string{"cannot be checkpointed: a kernel is missing", "cannot be checkpointed: it uses io_uring"},
		},
		"it is frozen":         {"abcdef", "", func(_ *node, s *shim) { s.answer.State, s.answer.Unchecked = "paused", true }, Warning, []string{"is paused", "were not looked at"}},
		"another release":      {"abcdef", "", func(_ *node, s *shim) { s.answer.AgentVersion = "v0.1" }, OK, []string{"keeps that one"}},
		"an older shim":        {"abcdef", "", func(_ *node, s *shim) { s.err = status.Error(codes.Unimplemented, "x") }, Error, []string{"does not answer", "created again"}},
		"the shim has died":    {"dead", "", func(n *node, _ *shim) { n.container("dead", nil) }, Error, []string{"does not answer"}},
		"another namespace":    {"abcdef", "other", func(*node, *shim) {}, Error, []string{"no container with a task has the ID abcdef"}},
		"a pattern":            {"*", "", func(*node, *shim) {}, Error, []string{"no ID of a container"}},
		"several":              {"a", "", func(n *node, _ *shim) { n.container("ab", nil) }, Error, []string{"several containers", "ab in ns"}},
		"one has that very ID": {"abcdef", "", func(n *node, _ *shim) { n.container("abcdef0", nil) }, OK, []string{"abcdef in namespace ns is running"}},
		"no room":              {"abcdef", "", func(n *node, _ *shim) { n.host.Config.ReserveBytes = 1 << 62; n.memory.Anon = 1 << 60 }, Error, []string{"stay free (reserve_bytes)"}},
	}
}

// checkContainer checks a container after what a test has changed.
func (n *node) checkContainer(c containerFault) Findings {
	n.t.Helper()
	n.host.Config.StateDir = n.dir
	n.dump = fmt.Sprintf("state = %q\n", n.path("run")) + n.dump
	s := &shim{answer: goodAnswer()}
	n.container("abcdef", s)
	c.change(n, s)
	n.serve()
	return n.host.Container(n.t.Context(), c.namespace, c.id)
}

func TestContainer(t *testing.T) {
	for name, c := range containerFaults() {
		t.Run(name, func(t *testing.T) {
			f := newNode(t).checkContainer(c)
			var text strings.Builder
			for _, finding := range f {
				fmt.Fprintln(&text, finding.Text, finding.Cure)
			}
			if f.Worst() != c.level {
				t.Errorf("the worst is %s, want %s: %s", f.Worst(), c.level, text.String())
			}
			for _, w := range c.words {
				if !strings.Contains(text.String(), w) {
					t.Errorf("nothing is said of %q: %s", w, text.String())
				}
			}
		})
	}
}

func TestContainerWithoutContainerd(t *testing.T) {
	h := &Host{Containerd: filepath.Join(t.TempDir(), "none.sock")}
	if f := h.Container(t.Context(), "", "x"); f.Worst() != Error {
		t.Errorf("got %+v", f)
	}
	if f := h.Guest(t.Context()); len(f) != 0 {
		t.Errorf("the findings of the host have it, and those of the guest are %+v", f)
	}
}
