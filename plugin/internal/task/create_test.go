// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/api/runtime/task/v2"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/typeurl/v2"
	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/config"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/bundle"
)

func TestCreatePreparesTheBundleBeforeKataReadsIt(t *testing.T) {
	h := newHarness(t)
	var seen *specs.Spec
	var marker []byte
	h.kata.Before("Create", func(context.Context) error {
		seen = readSpec(t, h.kata.Request("Create").(*task.CreateTaskRequest).Bundle)
		var err error
		marker, err = os.ReadFile(filepath.Join(h.exchange(), api.MarkerName))
		return err
	})
	h.create(nil)
	i := slices.IndexFunc(seen.Mounts, func(m specs.Mount) bool { return m.Destination == api.ExchangeDestination })
	if i < 0 {
		t.Fatalf("no exchange mount: %+v", seen.Mounts)
	}
	want := specs.Mount{Destination: api.ExchangeDestination, Type: "bind", Source: h.exchange(), Options: []string{"rbind", "rprivate", "rw"}}
	if diff := cmp.Diff(want, seen.Mounts[i]); diff != "" {
		t.Error(diff)
	}
	if got := seen.Annotations[annotations.ExternalMountsKey]; got != "/data" {
		t.Errorf("external mounts %q", got)
	}
	if !slices.Equal(seen.Process.Args, []string{"sh", "-c", "work"}) {
		t.Errorf("args %q", seen.Process.Args)
	}
	if st, err := os.Stat(h.exchange()); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("exchange directory: %v, %v", st.Mode(), err)
	}
	if _, err := h.task.Start(t.Context(), &task.StartRequest{ID: "c1"}); err != nil {
		t.Fatal(err)
	}
	adopt := h.guest.Request("Adopt").(*api.AdoptRequest)
	if len(marker) < 16 || adopt.GetToken() != string(marker) || adopt.GetExchangeDestination() != api.ExchangeDestination {
		t.Errorf("token %q, marker %q, destination %q", adopt.GetToken(), marker, adopt.GetExchangeDestination())
	}
}

func TestStartIsForwardedOnlyWhenTheExchangeMountIsGone(t *testing.T) {
	h := newHarness(t)
	h.create(nil)
	h.guest.Before("Adopt", func(context.Context) error {
		if h.kata.Called("Start c1") {
			t.Error("Start was forwarded before the mount was withdrawn")
		}
		return nil
	})
	if _, err := h.task.Start(t.Context(), &task.StartRequest{ID: "c1"}); err != nil {
		t.Fatal(err)
	}

	h = newHarness(t)
	h.create(nil)
	h.guest.Before("Adopt", func(context.Context) error { return errors.New("another mount is there") })
	_, err := h.task.Start(t.Context(), &task.StartRequest{ID: "c1"})
	wantError(t, err, "start container c1", "another mount is there")
	if h.kata.Called("Start c1") {
		t.Error("started with a writable host directory")
	}
}

func TestSandboxHasNoExchangeMount(t *testing.T) {
	for _, key := range []string{"io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType"} {
		h := newHarness(t)
		dir := h.create(func(s *specs.Spec) { s.Annotations[key] = "sandbox" })
		if spec := readSpec(t, dir); len(spec.Mounts) != 2 || exists(h.exchange()) {
			t.Errorf("%s: mounts %+v", key, spec.Mounts)
		}
		if _, err := h.task.Start(t.Context(), &task.StartRequest{ID: "c1"}); err != nil {
			t.Error(err)
		}
		h.wantCalls("the agent", h.guest.Calls())
	}
}

func TestCreateRefuses(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*specs.Spec)
		want   string
	}{
		"a mount of the user's in the way": {func(s *specs.Spec) {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/.kata-checkpoint", Type: "tmpfs"})
		}, "mount it elsewhere"},
		"an unknown value of the after annotation":   {func(s *specs.Spec) { s.Annotations[annotations.AfterKey] = "exit" }, `"exit"`},
		"an unknown value of the TCP annotation":     {func(s *specs.Spec) { s.Annotations[annotations.TCPKey] = "keep" }, `"keep"`},
		"an unknown value of the address annotation": {func(s *specs.Spec) { s.Annotations[annotations.AddressKey] = "moves" }, `"moves"`},
		"a relative external mount":                  {func(s *specs.Spec) { s.Annotations[annotations.ExternalMountsKey] = "x" }, "absolute"},
		"a pod container without a pod":              {func(s *specs.Spec) { s.Annotations["io.kubernetes.cri.container-type"] = "container" }, "sandbox-id"},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHarness(t)
			_, err := h.task.Create(t.Context(), &task.CreateTaskRequest{ID: "c1", Bundle: h.bundle(tc.change)})
			wantError(t, err, "create container c1", tc.want)
			if status.Code(err) != codes.InvalidArgument {
				t.Errorf("code %s", status.Code(err))
			}
			h.wantCalls("Kata", h.kata.Calls())
			if exists(h.exchange()) {
				t.Error("the exchange directory is left over")
			}
		})
	}
	t.Run("a bundle without config.json", func(t *testing.T) {
		h := newHarness(t)
		_, err := h.task.Create(t.Context(), &task.CreateTaskRequest{ID: "c1", Bundle: t.TempDir()})
		wantError(t, err, "has no config.json")
	})
	t.Run("what Kata refuses", func(t *testing.T) {
		h := newHarness(t)
		h.kata.Before("Create", func(context.Context) error { return errors.New("no VM") })
		_, err := h.task.Create(t.Context(), &task.CreateTaskRequest{ID: "c1", Bundle: h.bundle(nil)})
		wantError(t, err, "no VM")
		if exists(h.exchange()) {
			t.Error("the exchange directory is left over")
		}
	})
}

func TestOptionsOfCreate(t *testing.T) {
	pack := func(v any) *anypb.Any {
		a, err := typeurl.MarshalAnyToProto(v)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	of := func(path string) *anypb.Any { return pack(&runtimeoptions.Options{ConfigPath: path}) }
	for name, tc := range map[string]struct {
		setting  string
		in, want *anypb.Any
	}{
		"none":                               {},
		"none, a configuration is set":       {setting: "/etc/kata.toml", want: of("/etc/kata.toml")},
		"an empty one, of ctr's restore":     {in: &anypb.Any{}},
		"an empty one, with a setting":       {setting: "/etc/kata.toml", in: &anypb.Any{}, want: of("/etc/kata.toml")},
		"Kata's, which override the setting": {setting: "/etc/kata.toml", in: of("/x"), want: of("/x")},
		"runc's, which Kata leaves unread":   {in: pack(&runcoptions.Options{ShimCgroup: "x"}), want: pack(&runcoptions.Options{ShimCgroup: "x"})},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHarness(t, withConfig(func(c *config.Config) { c.KataConfigPath = tc.setting }))
			h.create(nil, func(r *task.CreateTaskRequest) { r.Options = tc.in })
			got := h.kata.Request("Create").(*task.CreateTaskRequest).GetOptions()
			if got.GetTypeUrl() != tc.want.GetTypeUrl() || string(got.GetValue()) != string(tc.want.GetValue()) || (got == nil) != (tc.want == nil) {
				t.Errorf("Kata got %v, want %v", got, tc.want)
			}
		})
	}
}

// A client names a checkpoint by its path in runc's options, which are not for
// Kata.
func TestOptionsThatNameACheckpoint(t *testing.T) {
	named, err := anypb.New(&runcoptions.Options{CriuImagePath: "/x"})
	if err != nil {
		t.Fatal(err)
	}
	s := &Service{cfg: &config.Config{KataConfigPath: "/etc/kata.toml"}}
	r := &task.CreateTaskRequest{Checkpoint: "/x", Options: named}
	if err := s.normalizeOptions(r); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(r.GetOptions().GetValue()), "/etc/kata.toml") {
		t.Errorf("Kata gets %v", r.GetOptions())
	}
}

func TestNoAgent(t *testing.T) {
	t.Run("required: Start fails with what to do", func(t *testing.T) {
		h := newHarness(t, withoutAgent, withoutWait)
		h.create(nil)
		_, err := h.task.Start(t.Context(), &task.StartRequest{ID: "c1"})
		wantError(t, err, "no agent", "sandbox_bind_mounts", h.cfg.GuestBundle, "guest_hook_path", `guest_agent = "optional"`)
		if status.Code(err) != codes.FailedPrecondition {
			t.Errorf("code %s", status.Code(err))
		}
		if h.kata.Called("Start c1") {
			t.Error("started")
		}
		// So that the engine can delete it.
		if got := h.status(); got != "STOPPED" {
			t.Errorf("State reports %s", got)
		}
		if _, err := h.task.Delete(t.Context(), &task.DeleteRequest{ID: "c1"}); err != nil || exists(h.exchange()) {
			t.Errorf("Delete: %v", err)
		}
	})
	t.Run("optional: it starts without a writable host directory, and a checkpoint is refused", func(t *testing.T) {
		h := newHarness(t, withoutAgent, withoutWait, withConfig(func(c *config.Config) { c.AgentOptional = true }))
		h.create(nil)
		h.kata.Before("Start", func(context.Context) error {
			if exists(h.exchange()) {
				t.Error("the exchange directory is there when the workload starts")
			}
			return nil
		})
		if _, err := h.task.Start(t.Context(), &task.StartRequest{ID: "c1"}); err != nil {
			t.Fatal(err)
		}
		if got := h.status(); got != "RUNNING" {
			t.Errorf("State reports %s", got)
		}
		_, err := h.task.Checkpoint(t.Context(), &task.CheckpointTaskRequest{ID: "c1", Path: t.TempDir()})
		wantError(t, err, "cannot be checkpointed", "no agent", "sandbox_bind_mounts")
		h.pause()
		if !h.kata.Called("Pause c1") {
			t.Error("nobody has paused it")
		}
	})
	t.Run("an agent of another protocol", func(t *testing.T) {
		h := newHarness(t)
		h.guest.SetProtocol(api.ProtocolVersion + 1)
		h.create(nil)
		_, err := h.task.Start(t.Context(), &task.StartRequest{ID: "c1"})
		wantError(t, err, "protocol 2", "same release")
		if strings.Contains(err.Error(), "sandbox_bind_mounts") {
			t.Errorf("advice that does not help: %v", err)
		}
	})
	t.Run("one that comes late", func(t *testing.T) {
		h := newHarness(t, withoutAgent, withoutWait)
		h.create(nil)
		h.guest.SetThere(true)
		if _, err := h.task.Start(t.Context(), &task.StartRequest{ID: "c1"}); err != nil {
			t.Error(err)
		}
	})
}

// Kata's Rust shim runs no guest hook for a container whose spec has hooks.
func TestBootstrapContainerStartsTheAgent(t *testing.T) {
	withHooks := func(s *specs.Spec) { s.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/bin/true"}}} }
	h := newHarness(t, withRust, withoutAgent)
	var bootstrap string
	h.kata.Before("Create", func(context.Context) error {
		r := h.kata.Request("Create").(*task.CreateTaskRequest)
		if r.ID == "c1" {
			return nil
		}
		bootstrap = r.ID
		spec := readSpec(t, r.Bundle)
		if spec.Hooks != nil || spec.Annotations["io.kubernetes.cri.container-type"] != "container" || spec.Annotations["io.kubernetes.cri.sandbox-id"] != "c1" {
			t.Errorf("spec %+v", spec)
		}
		if !h.events.hidden[bootstrap] {
			t.Error("containerd would see it")
		}
		h.guest.SetThere(true)
		return nil
	})
	h.run(withHooks)
	if bootstrap == "" {
		t.Fatal("there was none")
	}
	h.wantCalls("Kata", h.kata.Calls(), "Create c1", "Create "+bootstrap, "Start "+bootstrap, "State "+bootstrap, "Delete "+bootstrap, "Start c1")
	if left, err := filepath.Glob(bundle.BootstrapGlob(h.cfg.StateDir, "ns", "c1")); err != nil || len(left) != 0 {
		t.Errorf("left over: %q, %v", left, err)
	}

	// A second container in the VM needs none.
	h.kata.Before("Create", nil)
	if _, err := h.task.Create(t.Context(), &task.CreateTaskRequest{ID: "c2", Bundle: h.bundle(func(s *specs.Spec) {
		withHooks(s)
		s.Annotations["io.kubernetes.cri.container-type"], s.Annotations["io.kubernetes.cri.sandbox-id"] = "container", "c1"
	})}); err != nil {
		t.Fatal(err)
	}
	if calls := h.kata.Calls(); calls[len(calls)-1] != "Create c2" {
		t.Errorf("calls %q", calls)
	}
}

// Kata may remove what it leaves mounted: not after this, which comes before
// anything of the container can end.
func TestWhatKataSharesIsProtected(t *testing.T) {
	h := newHarness(t)
	h.create(nil)
	if len(h.protected) != 1 || !slices.Equal(h.protected[0], []string{"Create c1"}) {
		t.Errorf("after %q", h.protected)
	}

	h = newHarness(t)
	h.kata.Before("Create", func(context.Context) error { return errors.New("no root file system") })
	if _, err := h.task.Create(t.Context(), &task.CreateTaskRequest{ID: "c1", Bundle: h.bundle(nil)}); err == nil {
		t.Fatal("created")
	}
	if len(h.protected) != 1 {
		t.Errorf("after a Create that failed: %q", h.protected)
	}
}

// No entry can be created in a removed directory, even if it is still open
// or mounted: this is what makes the exchange mount of a container without an
// agent harmless.
func TestRemovedExchangeDirectoryIsInert(t *testing.T) {
	e, err := newExchange(t.TempDir(), "ns", "c1", nil)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.Open(e.dir)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if err := e.remove(); err != nil {
		t.Fatal(err)
	}
	if fd, err := unix.Openat(int(dir.Fd()), "x", unix.O_CREAT|unix.O_WRONLY, 0o600); !errors.Is(err, unix.ENOENT) {
		unix.Close(fd)
		t.Errorf("a file was made: %v", err)
	}
	if err := unix.Mkdirat(int(dir.Fd()), "x", 0o700); !errors.Is(err, unix.ENOENT) {
		t.Errorf("a directory was made: %v", err)
	}
	if err := e.remove(); err != nil {
		t.Error(err)
	}
}

func TestNewExchangeRemovesWhatWasLeft(t *testing.T) {
	state := t.TempDir()
	first, err := newExchange(state, "ns", "c1", nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(first.path("left"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	second, err := newExchange(state, "ns", "c1", nil)
	if err != nil {
		t.Fatal(err)
	}
	if exists(second.path("left")) || first.token == second.token {
		t.Error("not a new one")
	}
}

func TestDeleteRemovesTheExchangeDirectory(t *testing.T) {
	h := newHarness(t)
	h.run(nil)
	h.kata.Before("Delete", func(context.Context) error {
		if !exists(h.exchange()) {
			t.Error("removed while Kata still shares it")
		}
		return nil
	})
	if _, err := h.task.Delete(t.Context(), &task.DeleteRequest{ID: "c1"}); err != nil {
		t.Fatal(err)
	}
	if exists(h.exchange()) {
		t.Error("left over")
	}
	h.wantCalls("the agent", h.guest.Calls(), "Adopt c1", "Forget c1")
}

// Kata may not have stopped the container whose exit it has published.
func TestDeleteIsRepeatedWhileKataStopsTheContainer(t *testing.T) {
	h := newHarness(t)
	h.run(nil)
	times := 0
	h.kata.Before("Delete", func(context.Context) error {
		if times++; times < 3 {
			return errors.New("unlinkat /run/vc/sbs/c1/c1: directory not empty")
		}
		return nil
	})
	if _, err := h.task.Delete(t.Context(), &task.DeleteRequest{ID: "c1"}); err != nil || times != 3 {
		t.Errorf("after %d times: %v", times, err)
	}

	h = newHarness(t)
	h.run(nil)
	times = 0
	ctx, cancel := context.WithCancel(t.Context())
	h.kata.Before("Delete", func(context.Context) error {
		if times++; times == 2 {
			cancel()
		}
		return errors.New("unlinkat /run/vc/sbs/c1/c1: directory not empty")
	})
	if _, err := h.task.Delete(ctx, &task.DeleteRequest{ID: "c1"}); err == nil || times != 2 {
		t.Errorf("%d times although the caller had given up: %v", times, err)
	}
}

func TestDeleteThatKataRefusesKeepsTheContainer(t *testing.T) {
	h := newHarness(t)
	h.run(nil)
	h.kata.Before("Delete", func(context.Context) error { return errors.New("still running") })
	_, err := h.task.Delete(t.Context(), &task.DeleteRequest{ID: "c1"})
	wantError(t, err, "still running")
	h.pause()
	// containerd need not ask again, nor know the container any longer.
	h.kata.Die()
	<-h.down.Done()
	if exists(h.exchange()) {
		t.Error("its exchange directory is left")
	}
}
