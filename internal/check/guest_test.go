// SPDX-License-Identifier: Apache-2.0

package check

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	containers "github.com/containerd/containerd/api/services/containers/v1"
	tasks "github.com/containerd/containerd/api/services/tasks/v1"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
)

// guest is what a node's runtime does with the container of check --guest.
type guest struct {
	containers.UnimplementedContainersServer
	node *node
	// answer is that of its shim, which does not answer without one.
	answer *api.CheckResponse
	// fails are the calls that fail, by their names.
	fails map[string]bool

	rootfs string
	calls  []string
}

// call notes a call of containerd's.
func (g *guest) call(name string) error {
	g.calls = append(g.calls, name)
	if g.fails[name] {
		return errors.New(name + " has failed")
	}
	return nil
}

func (g *guest) Create(context.Context, *containers.CreateContainerRequest) (*containers.CreateContainerResponse, error) {
	return &containers.CreateContainerResponse{}, g.call("create container")
}

func (g *guest) Delete(context.Context, *containers.DeleteContainerRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, g.call("delete container")
}

func (m *metrics) Create(_ context.Context, r *tasks.CreateTaskRequest) (*tasks.CreateTaskResponse, error) {
	m.guest.rootfs = r.GetRootfs()[0].GetSource()
	return &tasks.CreateTaskResponse{}, m.guest.call("create")
}

// Start starts the container, whose program is ready at once.
func (m *metrics) Start(_ context.Context, r *tasks.StartRequest) (*tasks.StartResponse, error) {
	if err := m.guest.call("start"); err != nil {
		return nil, err
	}
	var s *shim
	if m.guest.answer != nil {
		s = &shim{answer: m.guest.answer}
	}
	m.guest.node.containerIn(guestNamespace, r.GetContainerID(), s)
	return &tasks.StartResponse{}, os.WriteFile(filepath.Join(m.guest.rootfs, "ready/ready"), nil, 0o600)
}

func (m *metrics) Pause(context.Context, *tasks.PauseTaskRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, m.guest.call("pause")
}

func (m *metrics) Checkpoint(context.Context, *tasks.CheckpointTaskRequest) (*tasks.CheckpointTaskResponse, error) {
	return &tasks.CheckpointTaskResponse{}, m.guest.call("checkpoint")
}

func (m *metrics) Resume(context.Context, *tasks.ResumeTaskRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, m.guest.call("resume")
}

func (m *metrics) Kill(context.Context, *tasks.KillRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, m.guest.call("kill")
}

func (m *metrics) Wait(context.Context, *tasks.WaitRequest) (*tasks.WaitResponse, error) {
	return &tasks.WaitResponse{}, m.guest.call("wait")
}

func (m *metrics) Delete(context.Context, *tasks.DeleteTaskRequest) (*tasks.DeleteResponse, error) {
	return &tasks.DeleteResponse{}, m.guest.call("delete")
}

// guestFault is something that is wrong in a guest, and the finding of it.
type guestFault struct {
	change func(*node)
	check  string
	level  Level
	text   string
	// calls are the last ones of containerd's, which remove what was made.
	calls string
}

func guestFaults() map[string]guestFault {
	const removed = "kill wait delete delete container"
	fails := func(calls ...string) func(*node) {
		return func(n *node) {
			for _, c := range calls {
				n.guest.fails[c] = true
			}
		}
	}
	return map[string]guestFault{
		"no container":                    {fails("create container"), "guest.start", Error, "create container has failed", "create container"},
		"no task":                         {fails("create"), "guest.start", Error, "no container starts", "create delete container"},
		"no start":                        {fails("start"), "guest.start", Error, "start has failed", removed},
		"a shim that does not answer":     {func(n *node) { n.guest.answer = nil }, "guest.agent", Error, "the shim does not answer", removed},
		"a kernel that lacks an option":   {func(n *node) { n.guest.answer.Reasons = []string{"an option is missing"} }, "guest.criu", Error, "an option is missing", removed},
		"no pause":                        {fails("pause"), "guest.checkpoint", Error, "pause has failed", removed},
		"no checkpoint":                   {fails("checkpoint"), "guest.checkpoint", Error, "checkpoint has failed", "checkpoint resume " + removed},
		"no resume":                       {fails("resume"), "guest.checkpoint", Error, "resume has failed", removed},
		"a container that does not go":    {fails("delete"), "guest.remove", Warning, "was not removed", "kill wait delete"},
		"a container that stays known":    {fails("delete container"), "guest.remove", Warning, "was not removed", removed},
		"no place for its root":           {func(n *node) { n.host.probeDir = n.path("none") }, "guest", Error, "no such file", ""},
		"a file where a socket should be": {func(n *node) { n.host.Containerd = n.path("100%.sock") }, "guest", Error, "is not a socket", ""},
	}
}

// checkGuest looks at a guest after what a test has changed.
func (n *node) checkGuest(c guestFault) Findings {
	n.t.Helper()
	n.host.probeDir = n.dir
	n.dump = "state = '" + n.path("run") + "'\n" + n.dump
	c.change(n)
	n.serve()
	return n.host.Guest(n.t.Context())
}

// Each fault of a guest is found, and the container is removed in any case.
func TestEachGuestFault(t *testing.T) {
	for name, c := range guestFaults() {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			f := n.checkGuest(c)
			var amiss Findings
			for _, finding := range f {
				if finding.Level != OK {
					amiss = append(amiss, finding)
				}
			}
			if len(amiss) != 1 || amiss[0].Check != c.check || amiss[0].Level != c.level || !strings.Contains(amiss[0].Text, c.text) || amiss[0].Cure == "" {
				t.Errorf("got %+v", amiss)
			}
			if calls := strings.Join(n.guest.calls, " "); !strings.HasSuffix(calls, c.calls) {
				t.Errorf("the calls are %s", calls)
			}
			left, err := filepath.Glob(n.path("kata-checkpoint-check-*"))
			if want := c.check == "guest.remove"; err != nil || (len(left) > 0) != want {
				t.Errorf("left is %v, %v", left, err)
			}
		})
	}
}

func TestGuest(t *testing.T) {
	n := newNode(t)
	f := n.checkGuest(guestFault{change: func(*node) {}})
	if f.Worst() != OK || len(f) != 3 {
		t.Errorf("got %+v", f)
	}
}
