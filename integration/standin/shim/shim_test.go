// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	task "github.com/containerd/containerd/api/runtime/task/v2"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/hostspec"
	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/way"
)

func TestFlagsAsContainerdGivesThem(t *testing.T) {
	f, err := parse([]string{"-namespace", "ns", "-address", "/run/c.sock", "-publish-binary", "/bin/c", "-id", "c1", "-bundle", "/b", "delete"})
	if err != nil || f.namespace != "ns" || f.id != "c1" || f.bundle != "/b" || f.action != "delete" {
		t.Errorf("%+v, %v", f, err)
	}
	if err := (&flags{namespace: "ns", action: "start"}).check(way.Go); err != nil {
		t.Errorf("the Go shim asks for more than a namespace: %v", err)
	}
	for _, f := range []flags{{action: "start"}, {namespace: "ns", id: "c1"}, {namespace: "ns", id: "c1", publish: "p", action: "delete"}} {
		if err := f.check(way.Rust); err == nil {
			t.Errorf("the Rust shim takes %+v", f)
		}
	}
}

// TestStartForAPodContainer: only the sandbox's own container starts a shim.
func TestStartForAPodContainer(t *testing.T) {
	bundle := t.TempDir()
	t.Chdir(bundle)
	spec := specs.Spec{
		Process: &specs.Process{}, Root: &specs.Root{}, Linux: &specs.Linux{},
		Annotations: map[string]string{"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "s1"},
	}
	raw, err := json.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("config.json", raw, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("address", []byte("somebody else's"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := start(way.Rust, &flags{namespace: "ns", id: "c1", address: "/run/c.sock", publish: "/bin/c"}); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(filepath.Join(bundle, "address"))
	if want := way.Rust.Address("/run/c.sock", "ns", "s1"); err != nil || string(got) != want {
		t.Errorf("%s %v, want %s", got, err, want)
	}
	if _, err := os.Stat("shim.pid"); !os.IsNotExist(err) {
		t.Errorf("a shim was started: %v", err)
	}
}

func TestTheEnginesOptionsNameTheConfiguration(t *testing.T) {
	raw, err := proto.Marshal(&runtimeoptions.Options{ConfigPath: "/etc/k.toml"})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		options *anypb.Any
		want    string
	}{
		{&anypb.Any{TypeUrl: "runtimeoptions.v1.Options", Value: raw}, "/etc/k.toml"},
		{&anypb.Any{TypeUrl: "containerd.runc.v1.Options", Value: []byte{1}}, ""},
		{nil, ""},
	} {
		if got, err := configPath(c.options); got != c.want || err != nil {
			t.Errorf("%v: %q %v", c.options, got, err)
		}
	}
}

func TestAnExecGetsNoCapabilitiesOfItsOwn(t *testing.T) {
	raw, err := json.Marshal(specs.Process{
		Args: []string{"sh"}, Capabilities: &specs.LinuxCapabilities{Bounding: []string{"CAP_SYS_ADMIN"}},
		Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	for w, limits := range map[way.Way]int{way.Go: 0, way.Rust: 1} {
		p, err := execSpec(w, &anypb.Any{Value: raw})
		if err != nil || p.Capabilities != nil || len(p.Rlimits) != limits {
			t.Errorf("%s: %+v, %v", w, p, err)
		}
	}
	if _, err := execSpec(way.Go, nil); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no process: %v", err)
	}
}

func TestErrorsHaveKatasCodes(t *testing.T) {
	for _, c := range []struct {
		way    way.Way
		method string
		err    error
		want   codes.Code
	}{
		{way.Go, "State", errdefs.ErrNotFound, codes.NotFound},
		{way.Go, "Pause", errors.New("x"), codes.Unknown},
		{way.Rust, "State", errdefs.ErrNotFound, codes.Unknown},
	} {
		_, err := asKata(c.way)(t.Context(), nil, &ttrpc.UnaryServerInfo{FullMethod: "/containerd.task.v2.Task/" + c.method},
			func(context.Context, func(any) error) (any, error) { return nil, c.err })
		if got := status.Code(err); got != c.want {
			t.Errorf("%s %s: %s, want %s", c.way, c.method, got, c.want)
		}
	}
}

func TestACheckpointIsRefusedInTheWordsOfEitherShim(t *testing.T) {
	for w, want := range map[way.Way]codes.Code{way.Go: codes.Unimplemented, way.Rust: codes.NotFound} {
		s := newService(w, "s1", "ns", nil, nil)
		_, err := asKata(w)(t.Context(), nil, &ttrpc.UnaryServerInfo{FullMethod: "/containerd.task.v2.Task/Checkpoint"},
			func(ctx context.Context, _ func(any) error) (any, error) {
				return s.Checkpoint(ctx, &task.CheckpointTaskRequest{})
			})
		if got := status.Code(err); got != want {
			t.Errorf("%s: %s, want %s", w, got, want)
		}
	}
}

func TestAHookThatFailsFailsTheGoWayOnly(t *testing.T) {
	c := &container{id: "c1", kind: hostspec.Single, bundle: "/b", spec: &specs.Spec{Version: "1.2.0"}}
	out := filepath.Join(t.TempDir(), "state")
	hooks := []specs.Hook{
		{Path: "/bin/sh", Args: []string{"sh", "-c", "cat > " + out}},
		{Path: "/bin/false"},
	}
	for w, state := range map[way.Way]string{
		way.Go:   `{"ociVersion":"","id":"c1","status":"","pid":7,"bundle":"/b"}`,
		way.Rust: `{"ociVersion":"1.2.0","id":"c1","status":"creating","pid":7,"bundle":"/b"}`,
	} {
		s := newService(w, "c1", "ns", nil, nil)
		err := s.runHooks(t.Context(), c, hooks, 7, specs.StateCreating)
		if (err != nil) != (w == way.Go) {
			t.Errorf("%s: %v", w, err)
		}
		if got, _ := os.ReadFile(out); strings.TrimSpace(string(got)) != state {
			t.Errorf("%s: %s, want %s", w, got, state)
		}
	}
}
