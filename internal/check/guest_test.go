// SPDX-License-Identifier: Apache-2.0

package check

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	containers "github.com/containerd/containerd/api/services/containers/v1"
	tasks "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
)

func init() { transferBytes = 64 << 10 }

// guest is what a node's runtime does with the container of check --guest.
type guest struct {
	containers.UnimplementedContainersServer
	node *node
	// answer is that of its shim, which does not answer without one.
	answer *api.CheckResponse
	// fails are the calls that fail, by their names.
	fails map[string]bool

	// before and after damage its root; lacks are what its kernel lacks.
	before, after func(root string) error
	lacks         []string

	rootfs string
	calls  []string
}

// run is what the container does, here.
func (g *guest) run() error {
	if g.before != nil {
		if err := g.before(g.rootfs); err != nil {
			return err
		}
	}
	if err := answerIn(g.rootfs); err != nil {
		return err
	}
	// Which kernel this machine has is of no interest.
	a, err := readAnswer(g.rootfs)
	if err != nil {
		return err
	}
	a.Lacks, a.Unknown = g.lacks, []string{"RSEQ"}
	data, err := json.Marshal(a)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(g.rootfs, readyName), data, 0o600); err != nil {
		return err
	}
	if g.after != nil {
		return g.after(g.rootfs)
	}
	return nil
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
	return &tasks.StartResponse{}, m.guest.run()
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
		"no container":                  {fails("create container"), "guest.start", Error, "create container has failed", "create container"},
		"no task":                       {fails("create"), "guest.start", Error, "no container starts", "create delete container"},
		"no start":                      {fails("start"), "guest.start", Error, "start has failed", removed},
		"a shim that does not answer":   {func(n *node) { n.guest.answer = nil }, "guest.agent", Error, "the shim does not answer", removed},
		"a kernel that lacks an option": {func(n *node) { n.guest.answer.Reasons = []string{"an option is missing"} }, "guest.criu", Error, "an option is missing", removed},
		"a file that reaches the guest as another": {
			func(n *node) {
				n.guest.before = func(root string) error {
					return os.WriteFile(filepath.Join(root, fromHostName), []byte("stale"), 0o600)
				}
			}, "guest.virtiofs", Error, "what the guest reads", removed,
		},
		"a file that reaches the host in part": {
			func(n *node) {
				n.guest.after = func(root string) error { return os.Truncate(filepath.Join(root, toHostName), 4096) }
			}, "guest.virtiofs", Error, "what the guest has written", removed,
		},
		"a file that does not reach the host": {
			func(n *node) {
				n.guest.after = func(root string) error { return os.Remove(filepath.Join(root, toHostName)) }
			}, "guest.virtiofs", Error, "what the guest has written", removed,
		},
		"an answer that cannot be read": {
			func(n *node) {
				n.guest.after = func(root string) error { return os.WriteFile(filepath.Join(root, readyName), []byte("ready"), 0o600) }
			}, "guest.start", Error, "read the answer of the container", removed,
		},
		"an answer that leads elsewhere": {
			func(n *node) {
				n.guest.after = func(root string) error {
					return errors.Join(os.Remove(filepath.Join(root, readyName)), os.Symlink("/etc/passwd", filepath.Join(root, readyName)))
				}
			}, "guest.start", Error, "escapes", removed,
		},
		"a guest that boots another kernel": {
			func(n *node) { n.guest.lacks = []string{"MEM_SOFT_DIRTY", "UNIX_DIAG", "TIME_NS", "anything"} },
			"guest.kernel", Error, "lacks UNIX_DIAG, TIME_NS: CRIU", removed,
		},
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
	var checks []string
	for _, finding := range f {
		checks = append(checks, finding.Check)
	}
	want := []string{"guest.start", "guest.agent", "guest.virtiofs", "guest.kernel", "guest.criu", "guest.checkpoint"}
	if f.Worst() != OK || !slices.Equal(checks, want) {
		t.Errorf("got %+v", f)
	}
	if text := f[3].Text; !strings.Contains(text, fmt.Sprintf("each of the %d options", len(KernelOptions)-1)) {
		t.Errorf("with one that is not known: %s", text)
	}
}

// A kernel that lacks what an option is for says so in its own way; any other
// error is one about the arguments.
func TestIsMissing(t *testing.T) {
	for err, want := range map[error]bool{
		nil: false, unix.EINVAL: false, unix.EBADF: false, unix.EFAULT: false, unix.EPERM: false,
		unix.ENOSYS: true, unix.EPROTONOSUPPORT: true, unix.EAFNOSUPPORT: true, &fs.PathError{Op: "lstat", Err: unix.ENOENT}: true,
		&netlink.OpError{Op: "receive", Err: unix.ENOENT}: true,
	} {
		if have := isMissing(err); have != want {
			t.Errorf("%v: missing %t", err, have)
		}
	}
}

// Each option has a way to be tried or is known to have none, and what the kernel
// of this machine has without a doubt is found.
func TestTryOptions(t *testing.T) {
	for _, o := range KernelOptions {
		if optionTries[o] == nil && o != "CGROUP_FREEZER" {
			t.Errorf("%s is not tried", o)
		}
	}
	for o := range optionTries {
		if !slices.Contains(KernelOptions, o) {
			t.Errorf("%s is no option of ours", o)
		}
	}
	lacks, unknown := tryOptions()
	t.Logf("this kernel lacks %v, and %v are not known", lacks, unknown)
	for _, o := range []string{"NAMESPACES", "PID_NS", "NET_NS", "UTS_NS", "EVENTFD", "SIGNALFD", "TIMERFD", "MEMFD_CREATE", "PROC_PAGE_MONITOR"} {
		if slices.Contains(lacks, o) || slices.Contains(unknown, o) {
			t.Errorf("this kernel lacks %v, and %v are not known: %s is among them", lacks, unknown, o)
		}
	}
}
