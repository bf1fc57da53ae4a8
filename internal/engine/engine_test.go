// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/typeurl/v2"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/internal/config"
	"github.com/kata-checkpoint/kata-checkpoint/internal/store"
)

// described is what describe makes of a container.
func described(t *testing.T, namespace, id string, labels, annotations map[string]string) *Container {
	t.Helper()
	spec, err := typeurl.MarshalAny(&specs.Spec{Annotations: annotations})
	if err != nil {
		t.Fatal(err)
	}
	n := &Node{Config: &config.Config{AfterCheckpoint: "stop", AfterCheckpointCRI: "leave-running"}}
	return n.describe(namespace, nil, containers.Container{ID: id, Labels: labels, Spec: spec, Runtime: containers.RuntimeInfo{Name: Runtime}})
}

func ofPod(kind, sandbox, pod, name string) map[string]string {
	return map[string]string{
		"io.kubernetes.cri.container-type": kind, "io.kubernetes.cri.sandbox-id": sandbox, "io.kubernetes.cri.sandbox-name": pod,
		"io.kubernetes.cri.sandbox-namespace": "shop", "io.kubernetes.cri.container-name": name,
	}
}

func TestMatch(t *testing.T) {
	all := []*Container{
		described(t, "default", "abc1", nil, nil),
		described(t, "default", "abc2", map[string]string{"nerdctl/name": "web"}, nil),
		described(t, "default", "abcd", map[string]string{"nerdctl/name": "abc1"}, nil),
		described(t, "moby", "def1", nil, nil),
		described(t, "k8s.io", "sb1", nil, ofPod("sandbox", "sb1", "front", "")),
		described(t, "k8s.io", "c1", nil, ofPod("container", "sb1", "front", "app")),
		described(t, "k8s.io", "c2", nil, ofPod("container", "sb2", "back", "app")),
		described(t, "k8s.io", "c3", nil, ofPod("container", "sb2", "back", "log")),
	}
	for ref, want := range map[string]string{
		"abc1": "abc1", // an ID is more than a name
		"web":  "abc2", "abcd": "abcd", "def": "def1", "log": "c3",
		"front/app": "c1", "shop/back/app": "c2", "sb1": "sb1",
		"nothing": "", "sb": "", "other/app": "",
	} {
		got, err := match(all, ref)
		if err != nil || (got == nil) != (want == "") || got != nil && got.ID != want {
			t.Errorf("%s is %v (%v), want %s", ref, got, err, want)
		}
	}
	for _, ref := range []string{"abc", "app"} {
		if got, err := match(all, ref); err == nil || !strings.Contains(err.Error(), "several containers are called "+ref) || !strings.Contains(err.Error(), "--namespace") {
			t.Errorf("%s is %v (%v)", ref, got, err)
		}
	}
}

func TestDescribe(t *testing.T) {
	for name, tc := range map[string]struct {
		c    *Container
		kind Kind
		pod  *store.Pod
		stop bool
	}{
		"ctr":                  {described(t, "default", "a", nil, nil), Containerd, nil, true},
		"nerdctl":              {described(t, "default", "a", map[string]string{"nerdctl/name": "web"}, nil), Nerdctl, nil, true},
		"docker":               {described(t, "moby", "a", nil, nil), Docker, nil, true},
		"the CRI":              {described(t, "k8s.io", "a", nil, ofPod("container", "sb", "front", "app")), CRI, &store.Pod{Namespace: "shop", Name: "front", Sandbox: "sb"}, false},
		"an annotation for it": {described(t, "default", "a", nil, map[string]string{"kata-checkpoint.dev/after": "leave-running"}), Containerd, nil, false},
	} {
		if tc.c.Kind != tc.kind || tc.c.Stops() != tc.stop || cmp.Diff(tc.pod, tc.c.Pod) != "" {
			t.Errorf("%s: %s, stops %v, %+v", name, tc.c.Kind, tc.c.Stops(), tc.c.Pod)
		}
		if err := tc.c.checkable(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	sandbox := described(t, "k8s.io", "sb", nil, ofPod("sandbox", "sb", "front", ""))
	if err := sandbox.checkable(); err == nil || !strings.Contains(err.Error(), "kata-checkpoint pod") {
		t.Errorf("a sandbox: %v", err)
	}
	other := described(t, "default", "a", nil, nil)
	other.info.Runtime.Name = "io.containerd.runc.v2"
	if err := other.checkable(); err == nil || !strings.Contains(err.Error(), "io.containerd.runc.v2") {
		t.Errorf("another runtime: %v", err)
	}
}

func TestAnnotations(t *testing.T) {
	list := []*store.Checkpoint{}
	for _, name := range []string{"app", "log"} {
		list = append(list, &store.Checkpoint{Record: &store.Record{Name: "g-" + name, ContainerName: name, Pod: &store.Pod{}}})
	}
	archive := func(c *store.Checkpoint) string { return c.Name + ".tar" }
	got, err := Annotations(list, archive)
	if diff := cmp.Diff(map[string]string{"kata-checkpoint.dev/restore.app": "g-app.tar", "kata-checkpoint.dev/restore.log": "g-log.tar"}, got); err != nil || diff != "" {
		t.Errorf("%v, -want +got:\n%s", err, diff)
	}
	if _, err := Annotations(append(list, list[0]), archive); err == nil {
		t.Error("two of the same name")
	}
	list[0].Pod = nil
	if _, err := Annotations(list, archive); err == nil {
		t.Error("one without a pod")
	}
}

// fakeDocker answers as Docker's API does.
func fakeDocker(t *testing.T, handler http.HandlerFunc) *Node {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "docker.sock")
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: handler}
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	t.Cleanup(func() {
		if err := server.Close(); err != nil {
			t.Error(err)
		}
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	})
	return &Node{Config: &config.Config{MaxImageFiles: 100, MaxImageBytes: 1 << 20}, DockerSocket: socket}
}

func TestDocker(t *testing.T) {
	n := fakeDocker(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/containers/web/json":
			_ = json.NewEncoder(w).Encode(map[string]string{"Id": "def1", "Name": "/web"})
		case "/info":
			_ = json.NewEncoder(w).Encode(map[string]string{"DockerRootDir": "/root"})
		default:
			w.WriteHeader(http.StatusNotFound)
			_ = json.NewEncoder(w).Encode(map[string]string{"message": "No such container: x\x1b"})
		}
	})
	if id, name, err := n.dockerContainer(t.Context(), "web"); id != "def1" || name != "web" || err != nil {
		t.Errorf("%s, %s, %v", id, name, err)
	}
	if _, _, err := n.dockerContainer(t.Context(), "x"); err == nil || err.Error() != "docker: No such container: x?" {
		t.Errorf("%v", err)
	}
	if root, err := n.dockerRoot(t.Context()); root != "/root" || err != nil {
		t.Errorf("%s, %v", root, err)
	}
	n.DockerSocket += "x"
	if _, err := n.dockerRoot(t.Context()); err == nil || !strings.Contains(err.Error(), n.DockerSocket) {
		t.Errorf("%v", err)
	}
}

// A failure ends the work for all, and what that interrupts is not what failed.
func TestEach(t *testing.T) {
	broken := errors.New("no room")
	jobs := []*job{{Container: described(t, "default", "a", nil, nil)}, {Container: described(t, "default", "b", nil, nil)}}
	err := each(t.Context(), jobs, func(ctx context.Context, j *job) error {
		if j.ID == "a" {
			return broken
		}
		<-ctx.Done()
		return ctx.Err()
	})
	if !errors.Is(err, broken) || strings.Contains(err.Error(), "canceled") || !strings.Contains(err.Error(), "checkpoint a ") {
		t.Errorf("%v", err)
	}
}
