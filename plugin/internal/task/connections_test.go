// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/containerd/containerd/api/runtime/task/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/thread"
)

// sandboxNamespace makes a network namespace as an engine does, whose interface
// has the address 192.0.2.2.
func sandboxNamespace(t *testing.T) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("makes a network namespace: only as root")
	}
	path := filepath.Join(t.TempDir(), "netns")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	err := thread.Do(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "node"}); err != nil {
			return err
		}
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		address, err := netlink.ParseAddr("192.0.2.2/24")
		if err != nil {
			return err
		}
		if err := netlink.AddrAdd(eth0, address); err != nil {
			return err
		}
		return unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "")
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return path
}

// held counts the connections that the gate of a namespace holds back.
func held(t *testing.T, path string) (n int) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h, err := netlink.NewHandleAt(netns.NsHandle(f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	eth0, err := h.LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	qdiscs, err := h.QdiscList(eth0)
	if err != nil {
		t.Fatal(err)
	}
	for _, q := range qdiscs {
		if q.Attrs().Parent != netlink.HANDLE_ROOT || q.Attrs().Handle == 0 {
			continue
		}
		filters, err := h.FilterList(eth0, q.Attrs().Handle)
		if err != nil {
			t.Fatal(err)
		}
		n += len(filters)
	}
	return n
}

// inNamespace has an engine put a container into a network namespace.
func inNamespace(path string, more ...func(*specs.Spec)) func(*specs.Spec) {
	return func(s *specs.Spec) {
		s.Linux = &specs.Linux{Namespaces: []specs.LinuxNamespace{{Type: specs.NetworkNamespace, Path: path}}}
		for _, change := range more {
			change(s)
		}
	}
}

func connected(ports ...string) func(*harness) {
	return func(h *harness) {
		for _, p := range ports {
			h.guest.Connections = append(h.guest.Connections, &api.Connection{Local: "192.0.2.2:" + p, Remote: "192.0.2.1:5432"})
		}
	}
}

// wantHeld checks the gate, now and when Kata or the agent gets a call.
func (h *harness) wantHeld(path string, want int) func(context.Context) error {
	return func(context.Context) error {
		h.t.Helper()
		if n := held(h.t, path); n != want {
			h.t.Errorf("%d connections are held back, not %d", n, want)
		}
		return nil
	}
}

func (h *harness) now(check func(context.Context) error) {
	h.t.Helper()
	if err := check(h.t.Context()); err != nil {
		h.t.Error(err)
	}
}

// keptSet makes an image set with connections, of a container that stops.
func keptSet(t *testing.T, path string, ports ...string) string {
	t.Helper()
	h := newHarness(t, connected(ports...))
	h.run(inNamespace(path))
	h.kata.Before("Kill", h.wantHeld(path, len(ports)))
	dir := t.TempDir()
	if err := h.checkpoint(dir, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := h.task.Delete(t.Context(), &task.DeleteRequest{ID: "c1"}); err != nil {
		t.Fatal(err)
	}
	h.now(h.wantHeld(path, len(ports))) // for whoever restores it
	return dir
}

func TestConnectionsAreHeldBackUntilTheRestore(t *testing.T) {
	path := sandboxNamespace(t)
	set := keptSet(t, path, "1001", "1002")
	fromSet := func(r *task.CreateTaskRequest) { r.Checkpoint = set }

	// One that fails does not end them.
	h := newHarness(t)
	h.create(inNamespace(path), fromSet)
	h.guest.Before("Restore", func(context.Context) error { return errors.New("CRIU says no") })
	if _, err := h.task.Start(t.Context(), &task.StartRequest{ID: "c1"}); err == nil {
		t.Fatal("restored")
	}
	if _, err := h.task.Delete(t.Context(), &task.DeleteRequest{ID: "c1"}); err != nil {
		t.Fatal(err)
	}
	h.now(h.wantHeld(path, 2))

	// Another namespace, as on another node, in which nothing is held yet.
	path = sandboxNamespace(t)
	h = newHarness(t)
	h.kata.Before("Create", h.wantHeld(path, 2))
	h.create(inNamespace(path), fromSet)
	h.guest.Before("Restore", h.wantHeld(path, 2))
	if _, err := h.task.Start(t.Context(), &task.StartRequest{ID: "c1"}); err != nil {
		t.Fatal(err)
	}
	h.now(h.wantHeld(path, 0))
	r := h.guest.Request("Restore").(*api.RestoreRequest)
	if list := r.GetConnections(); len(list) != 2 || list[1].GetLocal() != "192.0.2.2:1002" || list[1].GetRemote() != "192.0.2.1:5432" {
		t.Errorf("the agent is to restore %v", list)
	}
	if !r.GetOptions().GetTcpEstablished() {
		t.Error("CRIU is not told of connections")
	}
}

func TestAFreshContainerFindsTheGateOpen(t *testing.T) {
	path := sandboxNamespace(t)
	keptSet(t, path, "1001")
	h := newHarness(t)
	h.kata.Before("Create", h.wantHeld(path, 0))
	h.create(inNamespace(path))
}

func TestACheckpointThatDoesNotStopHoldsNothingBack(t *testing.T) {
	path := sandboxNamespace(t)
	h := newHarness(t, connected("1001"))
	h.run(inNamespace(path, func(s *specs.Spec) { s.Annotations["kata-checkpoint.dev/after"] = "leave-running" }))
	if err := h.checkpoint(t.TempDir(), nil); err != nil {
		t.Fatal(err)
	}
	h.now(h.wantHeld(path, 0))

	// Nor does one that was to stop, and could not.
	h = newHarness(t, connected("1001"))
	h.run(inNamespace(path))
	h.kata.Before("Kill", func(context.Context) error { return errors.New("the VM does not answer") })
	if err := h.checkpoint(t.TempDir(), nil); err == nil {
		t.Fatal("stopped")
	}
	h.now(h.wantHeld(path, 0))
}

func TestConnectionsThatAreNone(t *testing.T) {
	h := newHarness(t)
	h.guest.Connections = []*api.Connection{{Local: "nowhere", Remote: "192.0.2.1:5432"}}
	h.run(nil)
	err := h.checkpoint(t.TempDir(), nil)
	wantError(t, err, "TCP connection")
	if h.status() == "STOPPED" {
		t.Error("stopped without an image set")
	}
}

func TestAddressThatIsNone(t *testing.T) {
	h := newHarness(t)
	h.guest.Addresses = []*api.Address{{Interface: "eth0", Address: "fe80::1%eth0"}}
	h.run(nil)
	err := h.checkpoint(t.TempDir(), nil)
	wantError(t, err, "the agent returned an invalid address")
	if h.status() == "STOPPED" {
		t.Error("stopped without an image set")
	}
}

func TestSocketThatIsNone(t *testing.T) {
	h := newHarness(t)
	h.guest.Sockets = []*api.Socket{{Pid: 1, Memberships: []*api.Membership{{Interface: "eth0", Group: "everybody"}}}}
	h.run(nil)
	err := h.checkpoint(t.TempDir(), nil)
	wantError(t, err, "a socket has joined the group")
	if h.status() == "STOPPED" {
		t.Error("stopped without an image set")
	}
}

// The pod's sandbox has its address, and its VM, before its container is restored.
func TestConnectionsOfAPodAreHeldBackFromItsSandboxOn(t *testing.T) {
	path := sandboxNamespace(t)
	archives := archived(t, podContainer(), connected("1001", "1002", "1003"))
	h := newHarness(t, onNode(archives))
	h.kata.Before("Create", h.wantHeld(path, 3))
	h.create(inNamespace(path, func(s *specs.Spec) {
		s.Annotations = map[string]string{
			"io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-id": "c1", "io.kubernetes.cri.sandbox-namespace": "shop",
			restoreWeb: "x.tar", "kata-checkpoint.dev/restore.other": "missing.tar",
		}
	}))
	if _, err := h.task.Start(t.Context(), &task.StartRequest{ID: "c1"}); err != nil {
		t.Fatal(err)
	}
	create := func(id string, annotations ...string) {
		t.Helper()
		annotations = slices.Concat(annotations, []string{"io.kubernetes.cri.sandbox-id", "c1"})
		_, err := h.task.Create(t.Context(), &task.CreateTaskRequest{ID: id, Bundle: h.bundle(podContainer(annotations...))})
		if err != nil {
			t.Fatal(err)
		}
	}
	create("c2", "io.kubernetes.cri.container-name", "sidecar")
	create("c3", restoreWeb, "x.tar")
	if _, err := h.task.Start(t.Context(), &task.StartRequest{ID: "c3"}); err != nil {
		t.Fatal(err)
	}
	h.now(h.wantHeld(path, 0))
}
