// SPDX-License-Identifier: Apache-2.0

package nri

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/adaptation"
	"github.com/containerd/nri/pkg/api"

	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
)

// waitLimit is for what is to happen at once.
const waitLimit = 20 * time.Second

// TestMain makes of the test binary a plugin that can be pre-installed.
func TestMain(m *testing.M) {
	if os.Getenv(api.PluginSocketEnvVar) == "" {
		os.Exit(m.Run())
	}
	if err := New(testConfig()).Serve(context.Background(), Options{}); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// runtime is containerd's side of NRI, without containerd.
type runtime struct {
	*adaptation.Adaptation
	t *testing.T
}

// startRuntime has plugins in dir/plugins and its socket at dir/nri.sock.
func startRuntime(t *testing.T, dir string) *runtime {
	t.Helper()
	synchronize := func(ctx context.Context, callback adaptation.SyncCB) error {
		_, err := callback(ctx, nil, nil)
		return err
	}
	update := func(context.Context, []*adaptation.ContainerUpdate) ([]*adaptation.ContainerUpdate, error) {
		return nil, errors.New("the plugin updates no container")
	}
	a, err := adaptation.New("test", "2.4.0", synchronize, update,
		adaptation.WithSocketPath(filepath.Join(dir, "nri.sock")),
		adaptation.WithPluginPath(filepath.Join(dir, "plugins")),
		adaptation.WithPluginConfigPath(filepath.Join(dir, "conf.d")))
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Start(); err != nil {
		t.Fatal(err)
	}
	return &runtime{a, t}
}

// create creates a container and reports whether it was adjusted.
func (r *runtime) create(handler string) (*api.ContainerAdjustment, bool) {
	r.t.Helper()
	resp, err := r.CreateContainer(r.t.Context(), &api.CreateContainerRequest{
		Pod: &api.PodSandbox{Id: "p1", Name: "web", Namespace: "shop", RuntimeHandler: handler, Annotations: map[string]string{"kata-checkpoint.dev/after": "stop"}},
		Container: &api.Container{
			Id: "c1", PodSandboxId: "p1", Name: "nginx",
			Annotations: map[string]string{annotations.ExternalMountsKey: "/tmp"},
			Mounts:      []*api.Mount{{Destination: "/dev/shm", Type: "bind", Source: "/run/shm"}},
		},
	})
	if err != nil {
		r.t.Fatal(err)
	}
	_, marked := resp.GetAdjust().GetAnnotations()[annotations.NRIKey]
	return resp.GetAdjust(), marked
}

// waitFor creates containers until one is adjusted, or none is any more.
func (r *runtime) waitFor(adjusted bool) *api.ContainerAdjustment {
	r.t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.After(waitLimit); ; {
		if a, is := r.create("kata-checkpoint"); is == adjusted {
			return a
		}
		select {
		case <-deadline:
			r.t.Fatalf("containers adjusted: %t, and never %t", !adjusted, adjusted)
		case <-tick.C:
		}
	}
}

// serve runs the plugin as a service, until stop.
func serve(t *testing.T, dir string) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		ended <- New(testConfig()).Serve(ctx, Options{Index: "90", Name: "kata-checkpoint", Socket: filepath.Join(dir, "nri.sock")})
	}()
	stopped := false
	stop = func() {
		t.Helper()
		if stopped {
			return
		}
		stopped = true
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("Serve: %v", err)
			}
		case <-time.After(waitLimit):
			t.Error("Serve does not end")
		}
	}
	t.Cleanup(stop)
	return stop
}

func TestOnlyOurHandlerIsAdjusted(t *testing.T) {
	dir := t.TempDir()
	r := startRuntime(t, dir)
	defer r.Stop()
	serve(t, dir)

	a := r.waitFor(true)
	if got := a.GetAnnotations(); got["kata-checkpoint.dev/after"] != "stop" || got[annotations.ExternalMountsKey] != "/dev/shm,/tmp" {
		t.Errorf("annotations %v", got)
	}
	if m := a.GetMounts(); len(m) != 1 || m[0].GetDestination() != "/.kata-checkpoint" || m[0].GetSource() != "/state/exchange/k8s.io--c1" {
		t.Errorf("mounts %v", m)
	}
	for _, handler := range []string{"", "runc", "kata"} {
		if a, _ := r.create(handler); len(a.GetAnnotations()) > 0 || len(a.GetMounts()) > 0 {
			t.Errorf("handler %q: adjusted by %v", handler, a)
		}
	}
}

func TestRestartedPluginRegistersAgain(t *testing.T) {
	dir := t.TempDir()
	r := startRuntime(t, dir)
	defer r.Stop()
	for range 2 {
		stop := serve(t, dir)
		r.waitFor(true)
		stop()
		// This is what the shim makes up for.
		r.waitFor(false)
	}
}

func TestServiceOutlivesTheRuntime(t *testing.T) {
	dir := t.TempDir()
	// The service may also be there first.
	serve(t, dir)
	for range 2 {
		behind := t.TempDir()
		r := startRuntime(t, behind)
		lose := relay(t, filepath.Join(dir, "nri.sock"), filepath.Join(behind, "nri.sock"))
		r.waitFor(true)
		lose()
		r.Stop()
	}
}

// relay passes connections on until lose is called: NRI itself leaves them
// open for as long as its process lives.
func relay(t *testing.T, from, to string) (lose func()) {
	t.Helper()
	l, err := net.Listen("unix", from)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	var conns []net.Conn
	var copies sync.WaitGroup
	go func() {
		defer close(ended)
		for {
			a, err := l.Accept()
			if err != nil {
				return
			}
			conns = append(conns, a)
			b, err := net.Dial("unix", to)
			if err != nil {
				t.Error(err)
				return
			}
			conns = append(conns, b)
			copies.Go(func() { _, _ = io.Copy(a, b) })
			copies.Go(func() { _, _ = io.Copy(b, a) })
		}
	}()
	return func() {
		l.Close()
		<-ended
		for _, c := range conns {
			c.Close()
		}
		copies.Wait()
	}
}

func TestServiceEndsWhileNobodyAnswers(t *testing.T) {
	dir := t.TempDir()
	l, err := net.Listen("unix", filepath.Join(dir, "nri.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	stop := serve(t, dir)
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	stop()
}

func TestMistakesAreNotRetried(t *testing.T) {
	for name, o := range map[string]Options{
		// The test binary's name has none.
		"no index":          {},
		"an index too long": {Index: "123", Name: "kata-checkpoint"},
		"no number":         {Index: "ab"},
	} {
		if err := New(testConfig()).Serve(t.Context(), o); !errors.Is(err, errSetup) {
			t.Errorf("%s: error %v", name, err)
		}
	}
}

func TestPreinstalled(t *testing.T) {
	dir := t.TempDir()
	install(t, filepath.Join(dir, "plugins", "90-kata-checkpoint"))
	r := startRuntime(t, dir)
	defer r.Stop()
	if _, adjusted := r.create("kata-checkpoint"); !adjusted {
		t.Error("not adjusted")
	}
}

func install(t *testing.T, path string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	from, err := os.Open(self)
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	to, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o700)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(to, from); err != nil {
		t.Fatal(err)
	}
	if err := to.Close(); err != nil {
		t.Fatal(err)
	}
}
