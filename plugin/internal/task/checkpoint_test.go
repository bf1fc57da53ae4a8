// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v2"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/typeurl/v2"
	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/config"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/bundle"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/fake"
)

func pack(t *testing.T, v any) *anypb.Any {
	t.Helper()
	a, err := typeurl.MarshalAnyToProto(v)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func leaveRunning(s *specs.Spec) { s.Annotations[annotations.AfterKey] = annotations.LeaveRunning }

func (h *harness) checkpoint(path string, opts *anypb.Any) error {
	_, err := h.task.Checkpoint(h.t.Context(), &task.CheckpointTaskRequest{ID: "c1", Path: path, Options: opts})
	return err
}

// wantNothingLeft checks what a checkpoint that failed must leave: nothing.
func (h *harness) wantNothingLeft(path string) {
	h.t.Helper()
	if entries, err := os.ReadDir(path); err != nil || len(entries) != 0 {
		h.t.Errorf("left in the image directory: %v, %v", entries, err)
	}
	if entries, empty := h.noImages(); !empty {
		h.t.Errorf("left in the exchange directory: %v", entries)
	}
}

// noImages reports whether there is only the marker in the exchange directory.
func (h *harness) noImages() ([]os.DirEntry, bool) {
	h.t.Helper()
	entries, err := os.ReadDir(h.exchange())
	if err != nil {
		h.t.Fatal(err)
	}
	return entries, len(entries) == 1 && entries[0].Name() == api.MarkerName
}

// eventuallyNoImages waits until the images are removed, once the container
// runs again.
func (h *harness) eventuallyNoImages() {
	h.t.Helper()
	eventually(h.t, "only the marker is in the exchange directory", func() bool {
		_, empty := h.noImages()
		return empty
	})
}

func TestCheckpointOfAPausedContainer(t *testing.T) {
	h := newHarness(t)
	h.run(leaveRunning)
	h.pause()
	path := t.TempDir()
	if err := h.checkpoint(path, nil); err != nil {
		t.Fatal(err)
	}
	if got := h.status(); got != "PAUSED" {
		t.Errorf("State reports %s", got)
	}
	h.wantCalls("the agent", h.guest.Calls(), "Adopt c1", "Freeze c1", "Checkpoint c1")
	set, err := imageset.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer set.Close()
	m := set.Manifest
	if diff := cmp.Diff(imageset.Container{ID: "c1", Namespace: "ns", Args: []string{"sh", "-c", "work"}, Mounts: []string{"/data"}, Hostname: "host"}, m.Container); diff != "" {
		t.Error(diff)
	}
	if len(m.Files) != 2 || len(m.Externals) != 1 || len(m.Stdio) != 1 || len(m.OpenFiles) != 1 || m.Guest.CRIUVersion != 40201 || !m.Options.FileLocks || len(m.Phases) < 3 {
		t.Errorf("manifest %+v", m)
	}
	if left, err := os.ReadDir(bundle.UnfinishedDir(h.cfg.StateDir)); err != nil || len(left) > 0 {
		t.Errorf("notes of unfinished image sets: %v (%v)", left, err)
	}
	if want := []string{"/tasks/paused", "/tasks/checkpointed"}; !slices.Equal(h.events.published(), want) {
		t.Errorf("events %q", h.events.published())
	}
	if d := h.guest.Discarded(); len(d) != 0 {
		t.Errorf("the guest has to discard %q while the container is frozen", d)
	}
	h.resume()
	h.eventuallyNoImages()
	images := h.guest.Request("Checkpoint").(*api.CheckpointRequest).GetDirectory()
	if d := h.guest.Discarded(); !slices.Equal(d, []string{images}) {
		t.Errorf("the guest has discarded %q", d)
	}
}

// The wait for the disk is no part of the freeze where the engine has not paused
// the container, and always comes before the container is stopped.
func TestWaitForTheDisk(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*specs.Spec)
		paused bool
		want   string
	}{
		"leave running": {leaveRunning, false, "guest: thaw, sync"},
		"paused before": {leaveRunning, true, "sync"},
		"stop":          {nil, false, "sync"},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHarness(t)
			h.run(tc.change)
			if tc.paused {
				h.pause()
			}
			path := t.TempDir()
			h.kata.Before("Kill", func(context.Context) error {
				if !exists(filepath.Join(path, imageset.ManifestName)) {
					t.Error("killed before the image set is complete")
				}
				return nil
			})
			if err := h.checkpoint(path, nil); err != nil {
				t.Fatal(err)
			}
			set, err := imageset.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			defer set.Close()
			var got []string
			for _, p := range set.Manifest.Phases {
				if p.Name == "guest: thaw" || p.Name == "sync" {
					got = append(got, p.Name)
				}
			}
			if diff := cmp.Diff(tc.want, strings.Join(got, ", ")); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// A container with CAP_SYS_ADMIN can give itself any host name.
func TestHostName(t *testing.T) {
	for name, want := range map[string]string{"host": "host", "": "", "a\x1b[2J": "a?[2J", "\xff": "?", strings.Repeat("ü", 40): strings.Repeat("ü", 32)} {
		if got := hostName(name); got != want {
			t.Errorf("%q: %q", name, got)
		}
	}
}

// The guest may be another one by then, or out of order.
func TestImagesAreRemovedWithoutTheGuest(t *testing.T) {
	h := newHarness(t)
	h.run(leaveRunning)
	h.guest.Before("Discard", func(context.Context) error { return errors.New("it cannot") })
	if err := h.checkpoint(t.TempDir(), nil); err != nil {
		t.Fatal(err)
	}
	h.eventuallyNoImages()
}

func TestCheckpointOfARunningContainerFreezesAndThaws(t *testing.T) {
	h := newHarness(t)
	h.run(leaveRunning)
	h.guest.Before("Checkpoint", func(context.Context) error {
		if got := h.status(); got != "PAUSED" {
			t.Errorf("State reports %s during the checkpoint", got)
		}
		return nil
	})
	if err := h.checkpoint(t.TempDir(), nil); err != nil {
		t.Fatal(err)
	}
	if got := h.status(); got != "RUNNING" {
		t.Errorf("State reports %s", got)
	}
	h.wantCalls("the agent", h.guest.Calls(), "Adopt c1", "CheckCheckpoint c1", "Freeze c1", "Checkpoint c1", "Thaw c1")
}

func TestCheckpointThatStops(t *testing.T) {
	h := newHarness(t)
	h.run(nil)
	h.pause()
	path := t.TempDir()
	h.kata.Before("Kill", func(context.Context) error {
		r := h.kata.Request("Kill").(*task.KillRequest)
		if r.GetSignal() != 9 || !r.GetAll() {
			t.Errorf("kill %v", r)
		}
		if !exists(filepath.Join(path, imageset.ManifestName)) {
			t.Error("killed before the image set was safe")
		}
		return nil
	})
	if err := h.checkpoint(path, nil); err != nil {
		t.Fatal(err)
	}
	if got := h.status(); got != "STOPPED" {
		t.Errorf("State reports %s", got)
	}
	h.resume() // as engines do
	h.wantCalls("the agent", h.guest.Calls(), "Adopt c1", "Freeze c1", "Checkpoint c1")
	if h.kata.Called("Wait c1") {
		t.Error("a Wait of our own: Kata's Rust shim would stop the sandbox")
	}
}

func TestOptionsOfCheckpoint(t *testing.T) {
	for name, tc := range map[string]struct {
		opts        *runcoptions.CheckpointOptions
		annotations map[string]string
		want        *api.CheckpointOptions
		err         string
	}{
		"nil, as nerdctl and the CRI send":   {want: &api.CheckpointOptions{FileLocks: true}},
		"empty, as ctr sends":                {opts: &runcoptions.CheckpointOptions{}, want: &api.CheckpointOptions{FileLocks: true}},
		"all that mean something in a guest": {opts: &runcoptions.CheckpointOptions{OpenTcp: true, ExternalUnixSockets: true, Terminal: true, FileLocks: true, EmptyNamespaces: []string{"network"}, CgroupsMode: "ignore"}, want: &api.CheckpointOptions{TcpEstablished: true, ExternalUnixSockets: true, Terminal: true, FileLocks: true, EmptyNamespaces: []string{"network"}}},
		"TCP kept by annotation":             {annotations: map[string]string{annotations.TCPKey: "established"}, want: &api.CheckpointOptions{TcpEstablished: true, FileLocks: true}},
		"an address that stays":              {annotations: map[string]string{annotations.AddressKey: "stays"}, want: &api.CheckpointOptions{AddressStays: true, FileLocks: true}},
		"TCP closed by annotation":           {opts: &runcoptions.CheckpointOptions{OpenTcp: true}, annotations: map[string]string{annotations.TCPKey: "close"}, want: &api.CheckpointOptions{TcpClose: true, FileLocks: true}},
		"on top of an earlier one":           {opts: &runcoptions.CheckpointOptions{ParentPath: "/x"}, err: "/x"},
		"a mode for cgroups":                 {opts: &runcoptions.CheckpointOptions{CgroupsMode: "strict"}, err: "strict"},
		"an empty namespace that cannot be":  {opts: &runcoptions.CheckpointOptions{EmptyNamespaces: []string{"pid"}}, err: "pid"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := criuOptions(tc.opts, tc.annotations)
			if tc.err != "" {
				wantError(t, err, tc.err)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if !proto.Equal(got, tc.want) {
				t.Errorf("got %v, want %v", got, tc.want)
			}
		})
	}
	t.Run("of another type", func(t *testing.T) {
		h := newHarness(t)
		h.run(nil)
		wantError(t, h.checkpoint(t.TempDir(), pack(t, &runcoptions.Options{})), "containerd.runc.v1.Options")
		wantError(t, h.checkpoint(t.TempDir(), &anypb.Any{TypeUrl: "nobody/knows"}), "nobody/knows")
		wantError(t, h.checkpoint("relative", nil), "absolute")
	})
}

// The rule for what becomes of a container, engine by engine.
func TestAfterCheckpoint(t *testing.T) {
	cfg := func(after, cri string) *config.Config {
		return &config.Config{AfterCheckpoint: after, AfterCheckpointCRI: cri}
	}
	defaults := cfg(annotations.Stop, annotations.LeaveRunning)
	cri := map[string]string{"io.kubernetes.cri.container-type": "container"}
	with := func(m map[string]string, after string) map[string]string {
		out := map[string]string{annotations.AfterKey: after}
		maps.Copy(out, m)
		return out
	}
	for name, tc := range map[string]struct {
		opts        *runcoptions.CheckpointOptions
		annotations map[string]string
		cfg         *config.Config
		stop        bool
		err         string
	}{
		"nerdctl, docker":                         {stop: true},
		"nerdctl --leave-running, by default":     {stop: true}, // the shim does not see it
		"nerdctl, set to leave running":           {cfg: cfg(annotations.LeaveRunning, annotations.Stop), stop: false},
		"nerdctl, annotation leave-running":       {annotations: with(nil, "leave-running"), stop: false},
		"crictl, kubelet":                         {annotations: cri, stop: false},
		"CRI-O":                                   {annotations: map[string]string{"io.kubernetes.cri-o.ContainerType": "container"}, stop: false},
		"crictl, set to stop":                     {annotations: cri, cfg: cfg(annotations.LeaveRunning, annotations.Stop), stop: true},
		"crictl, annotation stop":                 {annotations: with(cri, "stop"), stop: true},
		"ctr task checkpoint":                     {opts: &runcoptions.CheckpointOptions{}, stop: false},
		"ctr task checkpoint --exit":              {opts: &runcoptions.CheckpointOptions{Exit: true}, stop: true},
		"ctr container checkpoint":                {opts: &runcoptions.CheckpointOptions{FileLocks: true}, stop: false},
		"ctr --exit, annotation leave-running":    {opts: &runcoptions.CheckpointOptions{Exit: true}, annotations: with(nil, "leave-running"), stop: false},
		"ctr, annotation stop":                    {opts: &runcoptions.CheckpointOptions{}, annotations: with(nil, "stop"), stop: true},
		"options override the default of the CRI": {opts: &runcoptions.CheckpointOptions{Exit: true}, annotations: cri, stop: true},
		"an unknown annotation":                   {annotations: with(nil, "exit"), err: `"exit"`},
		"an empty annotation":                     {annotations: with(nil, ""), err: `""`},
	} {
		t.Run(name, func(t *testing.T) {
			if tc.cfg == nil {
				tc.cfg = defaults
			}
			stop, err := stopsAfterCheckpoint(tc.opts, tc.annotations, tc.cfg)
			if tc.err != "" {
				wantError(t, err, annotations.AfterKey, tc.err)
				return
			}
			if err != nil || stop != tc.stop {
				t.Errorf("stop %v, %v; want %v", stop, err, tc.stop)
			}
		})
	}
}

func TestCheckpointRefused(t *testing.T) {
	t.Run("of nobody", func(t *testing.T) {
		h := newHarness(t)
		if err := h.checkpoint(t.TempDir(), nil); status.Code(err) != codes.NotFound {
			t.Errorf("got %v", err)
		}
	})
	t.Run("of a created container", func(t *testing.T) {
		h := newHarness(t)
		h.create(nil)
		wantError(t, h.checkpoint(t.TempDir(), nil), "has not been started")
	})
	t.Run("of a stopped container", func(t *testing.T) {
		h := newHarness(t)
		h.run(nil)
		h.events.onExit("c1", "")
		wantError(t, h.checkpoint(t.TempDir(), nil), "has stopped")
	})
	t.Run("before anything is frozen", func(t *testing.T) {
		h := newHarness(t)
		h.run(nil)
		full := t.TempDir()
		if err := os.WriteFile(filepath.Join(full, "x"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		wantError(t, h.checkpoint("/does/not/exist", nil), "does not exist")
		wantError(t, h.checkpoint(full, nil), "not empty")
		wantError(t, h.checkpoint(t.TempDir(), pack(t, &runcoptions.CheckpointOptions{ParentPath: "/p"})), "/p")
		h.guest.SetProblems("the guest kernel is too small", "CRIU is missing")
		err := h.checkpoint(t.TempDir(), nil)
		wantError(t, err, "the guest kernel is too small; CRIU is missing")
		if status.Code(err) != codes.FailedPrecondition {
			t.Errorf("code %s", status.Code(err))
		}
		h.guest.SetProblems()
		h.guest.Before("CheckCheckpoint", func(context.Context) error {
			return errgrpc.ToGRPCf(errdefs.ErrFailedPrecondition, "the workload uses io_uring")
		})
		err = h.checkpoint(t.TempDir(), nil)
		wantError(t, err, "the workload uses io_uring")
		if status.Code(err) != codes.FailedPrecondition {
			t.Errorf("code %s", status.Code(err))
		}
		h.guest.SetThere(false)
		withoutWait(h)
		wantError(t, h.checkpoint(t.TempDir(), nil), "no agent answers")
		h.wantCalls("the agent", h.guest.Calls(), "Adopt c1", "CheckCheckpoint c1")
		if got := h.status(); got != "RUNNING" {
			t.Errorf("State reports %s", got)
		}
	})
	t.Run("a second one", func(t *testing.T) {
		h := newHarness(t)
		h.run(leaveRunning)
		reached, release := make(chan struct{}), make(chan struct{})
		h.guest.Before("Checkpoint", func(context.Context) error {
			close(reached)
			<-release
			return nil
		})
		path := t.TempDir()
		first := make(chan error, 1)
		go func() { first <- h.checkpoint(path, nil) }()
		<-reached
		err := h.checkpoint(t.TempDir(), nil)
		wantError(t, err, "in progress")
		if status.Code(err) != codes.FailedPrecondition {
			t.Errorf("code %s", status.Code(err))
		}
		close(release)
		if err := <-first; err != nil {
			t.Error(err)
		}
	})
}

func TestCheckpointThatFails(t *testing.T) {
	for name, spoil := range map[string]func(h *harness) string{
		"CRIU": func(h *harness) string {
			h.guest.Before("Checkpoint", func(context.Context) error {
				return errgrpc.ToGRPCf(errdefs.ErrUnknown, "criu dump failed: no")
			})
			return "criu dump failed: no"
		},
		"the agent dies": func(h *harness) string {
			h.guest.Before("Checkpoint", func(context.Context) error {
				h.guest.SetThere(false)
				h.guest.SetThere(true)
				return errors.New("nobody hears this")
			})
			return "the agent in the guest is gone"
		},
		"too much": func(h *harness) string {
			h.cfg.MaxImageBytes = 10
			return "max_image_bytes"
		},
		"a link in the images": func(h *harness) string {
			h.guest.Before("Checkpoint", func(context.Context) error {
				dir := filepath.Join(h.exchange(), h.guest.Request("Checkpoint").(*api.CheckpointRequest).GetDirectory())
				return os.Symlink("/etc/passwd", filepath.Join(dir, "core-1.img"))
			})
			return "not a regular file"
		},
		"the image directory goes away": func(h *harness) string {
			h.guest.Before("Checkpoint", func(context.Context) error {
				note, err := os.ReadFile(filepath.Join(h.kata.Request("Create").(*task.CreateTaskRequest).Bundle, "kata-checkpoint.staging"))
				return errors.Join(err, os.RemoveAll(string(note)))
			})
			return "no such file"
		},
	} {
		t.Run(name, func(t *testing.T) {
			for _, paused := range []bool{false, true} {
				h := newHarness(t)
				h.run(nil) // would stop, if it worked
				if paused {
					h.pause()
				}
				want := spoil(h)
				path := t.TempDir()
				wantError(t, h.checkpoint(path, nil), "checkpoint container c1", want)
				h.wantNothingLeft(path)
				wantStatus := map[bool]string{false: "RUNNING", true: "PAUSED"}[paused]
				if got := h.status(); got != wantStatus {
					t.Errorf("State reports %s, want %s", got, wantStatus)
				}
				if paused {
					h.resume()
				}
				calls := h.guest.Calls()
				if last := calls[len(calls)-1]; last != "Thaw c1" {
					t.Errorf("the agent's last call is %q", last)
				}
				if h.kata.Called("Kill c1") {
					t.Error("killed")
				}
				// And nothing stands in the way of the next.
				h.guest.Before("Checkpoint", nil)
				h.cfg.MaxImageBytes = 1 << 20
				if err := h.checkpoint(path, nil); err != nil {
					t.Errorf("the next one: %v", err)
				}
			}
		})
	}
}

// A caller whose deadline has passed or that is gone resumes nothing any
// longer.
func TestCheckpointThatIsAbandonedThawsWhatItsCallerPaused(t *testing.T) {
	for name, call := range map[string]func(h *harness, limit time.Duration, reached chan struct{}, path string) error{
		"its deadline passes": func(h *harness, limit time.Duration, _ chan struct{}, path string) error {
			ctx, cancel := context.WithTimeout(h.t.Context(), limit)
			defer cancel()
			_, err := h.task.Checkpoint(ctx, &task.CheckpointTaskRequest{ID: "c1", Path: path})
			return err
		},
		"checkpoint_timeout expires": func(h *harness, limit time.Duration, _ chan struct{}, path string) error {
			h.cfg.CheckpointTimeout = limit
			err := h.checkpoint(path, nil)
			wantError(h.t, err, "checkpoint_timeout of "+limit.String()+" has expired")
			return err
		},
		"the connection ends": func(h *harness, _ time.Duration, reached chan struct{}, path string) error {
			go func() {
				<-reached
				h.conn.Close()
			}()
			return h.checkpoint(path, nil)
		},
	} {
		// abandoned reports whether the agent was reached before the limit.
		abandoned := func(t *testing.T, limit time.Duration) bool {
			h := newHarness(t)
			h.run(nil)
			h.pause()
			reached, ended := make(chan struct{}), make(chan struct{})
			h.guest.Before("Checkpoint", func(ctx context.Context) error {
				close(reached)
				<-ctx.Done() // the agent learns of it
				close(ended)
				return ctx.Err()
			})
			path := t.TempDir()
			if err := call(h, limit, reached, path); err == nil {
				t.Fatal("no error")
			}
			select {
			case <-reached:
			default:
				return false
			}
			<-ended
			eventually(t, "thawed", func() bool {
				calls := h.guest.Calls()
				return calls[len(calls)-1] == "Thaw c1"
			})
			eventually(t, "said so", func() bool { return slices.Contains(h.events.published(), "/tasks/resumed") })
			eventually(t, "cleaned up", func() bool {
				entries, err := os.ReadDir(path)
				return err == nil && len(entries) == 0
			})
			return true
		}
		t.Run(name, func(t *testing.T) {
			limit := 200 * time.Millisecond
			for !abandoned(t, limit) {
				if limit *= 2; limit > waitLimit {
					t.Fatalf("the agent is not reached within %s", limit)
				}
			}
		})
	}
}

func TestResumeDuringACheckpoint(t *testing.T) {
	begin := func(t *testing.T) (*harness, chan struct{}, chan error) {
		h := newHarness(t)
		h.run(leaveRunning)
		h.pause()
		reached, release := make(chan struct{}), make(chan struct{})
		h.guest.Before("Checkpoint", func(context.Context) error {
			close(reached)
			<-release
			return nil
		})
		done, path := make(chan error, 1), t.TempDir()
		go func() { done <- h.checkpoint(path, nil) }()
		<-reached
		return h, release, done
	}
	t.Run("waits for its end", func(t *testing.T) {
		h, release, done := begin(t)
		resumed := make(chan error, 1)
		go func() {
			_, err := h.task.Resume(context.Background(), &task.ResumeRequest{ID: "c1"})
			resumed <- err
		}()
		select {
		case err := <-resumed:
			t.Fatalf("did not wait: %v", err)
		case <-time.After(50 * time.Millisecond):
		}
		close(release)
		if err := errors.Join(<-done, <-resumed); err != nil {
			t.Fatal(err)
		}
		h.wantCalls("the agent", h.guest.Calls(), "Adopt c1", "Freeze c1", "Checkpoint c1", "Thaw c1")
	})
	t.Run("happens even if its caller gives up", func(t *testing.T) {
		h, release, done := begin(t)
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if _, err := h.task.Resume(ctx, &task.ResumeRequest{ID: "c1"}); err == nil {
			t.Fatal("no error")
		}
		close(release)
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		eventually(t, "thawed", func() bool { return slices.Contains(h.guest.Calls(), "Thaw c1") })
		eventually(t, "shown as running", func() bool { return h.status() == "RUNNING" })
	})
}

func TestOtherCallsDuringACheckpoint(t *testing.T) {
	h := newHarness(t)
	h.run(leaveRunning)
	reached, release := make(chan struct{}), make(chan struct{})
	h.guest.Before("Checkpoint", func(context.Context) error {
		close(reached)
		<-release
		return nil
	})
	done, path := make(chan error, 1), t.TempDir()
	go func() { done <- h.checkpoint(path, nil) }()
	<-reached
	if got := h.status(); got != "PAUSED" {
		t.Errorf("State reports %s", got)
	}
	if _, err := h.task.Stats(t.Context(), &task.StatsRequest{ID: "c1"}); err != nil {
		t.Error(err)
	}
	if _, err := h.task.Kill(t.Context(), &task.KillRequest{ID: "c1", Signal: 15}); err != nil {
		t.Error(err)
	}
	if _, err := h.task.Create(t.Context(), &task.CreateTaskRequest{ID: "c2", Bundle: h.bundle(func(s *specs.Spec) {
		s.Annotations["io.kubernetes.cri.container-type"], s.Annotations["io.kubernetes.cri.sandbox-id"] = "container", "c1"
	})}); err != nil {
		t.Error(err)
	}
	close(release)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestKilledDuringACheckpoint(t *testing.T) {
	h := newHarness(t)
	h.run(nil)
	h.pause()
	h.guest.Before("Checkpoint", func(context.Context) error {
		h.kata.SetStatus("c1", statusStopped)
		h.events.onExit("c1", "")
		return errgrpc.ToGRPCf(errdefs.ErrNotFound, "the process of container c1 has ended")
	})
	path := t.TempDir()
	wantError(t, h.checkpoint(path, nil), "has ended")
	h.wantNothingLeft(path)
	if got := h.status(); got != "STOPPED" {
		t.Errorf("State reports %s", got)
	}
}

func TestWorkPath(t *testing.T) {
	t.Run("of the options", func(t *testing.T) {
		h := newHarness(t)
		h.run(nil)
		path, work := t.TempDir(), filepath.Join(t.TempDir(), "work")
		if err := h.checkpoint(path, pack(t, &runcoptions.CheckpointOptions{WorkPath: work})); err != nil {
			t.Fatal(err)
		}
		wantFiles(t, work, imageset.DumpLogName, imageset.StatsName)
		wantFiles(t, path, "inventory.img", imageset.ManifestName, imageset.SignatureName, "pages-1.img")
	})
	t.Run("after a failure", func(t *testing.T) {
		for _, given := range []bool{true, false} {
			h := newHarness(t)
			dir := h.run(nil)
			h.guest.Before("Checkpoint", func(context.Context) error {
				return errgrpc.ToGRPCf(errdefs.ErrUnknown, "criu dump failed")
			})
			var options *anypb.Any
			work := filepath.Join(dir, bundle.LogDir)
			if given {
				work = filepath.Join(t.TempDir(), "work")
				options = pack(t, &runcoptions.CheckpointOptions{WorkPath: work})
			}
			err := h.checkpoint(t.TempDir(), options)
			wantError(t, err, "criu dump failed")
			wantError(t, err, "CRIU's log is in "+filepath.Join(work, imageset.DumpLogName))
			if log, err := os.ReadFile(filepath.Join(work, imageset.DumpLogName)); err != nil || string(log) != fake.FailedLog {
				t.Errorf("the log is %q (%v)", log, err)
			}
		}
	})
	t.Run("after a refusal", func(t *testing.T) {
		h := newHarness(t)
		dir := h.run(nil)
		h.guest.Before("CheckCheckpoint", func(context.Context) error {
			return errgrpc.ToGRPCf(errdefs.ErrFailedPrecondition, "the workload uses io_uring")
		})
		err := h.checkpoint(t.TempDir(), nil)
		if err == nil || strings.Contains(err.Error(), "CRIU's log") {
			t.Errorf("CRIU has not run, and the error is %v", err)
		}
		if _, err := os.Stat(filepath.Join(dir, bundle.LogDir)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("there is a directory for its log (%v)", err)
		}
	})
	t.Run("of the CRI", func(t *testing.T) {
		for _, fresh := range []bool{true, false} {
			h := newHarness(t)
			dir := h.run(func(s *specs.Spec) {
				s.Annotations["io.kubernetes.cri.container-type"], s.Annotations["io.kubernetes.cri.sandbox-id"] = "container", "c0"
			})
			root := t.TempDir()
			work := filepath.Join(root, "io.containerd.grpc.v1.cri/containers/c1")
			if fresh {
				work = filepath.Join(work, "ctrd-checkpoint")
			}
			if err := errors.Join(os.MkdirAll(work, 0o700), os.Symlink(filepath.Join(root, "io.containerd.runtime.v2.task/k8s.io/c1"), filepath.Join(dir, "work"))); err != nil {
				t.Fatal(err)
			}
			if err := h.checkpoint(t.TempDir(), nil); err != nil {
				t.Fatal(err)
			}
			wantFiles(t, work, imageset.DumpLogName, imageset.StatsName)
		}
	})
}

func wantFiles(t *testing.T, dir string, want ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	if !slices.Equal(got, want) {
		t.Errorf("%s holds %q, want %q", dir, got, want)
	}
}

// imageSet makes a checkpoint of c1 and returns its directory.
func imageSet(t *testing.T, options ...option) string {
	t.Helper()
	h := newHarness(t, options...)
	h.run(nil)
	path := t.TempDir()
	if err := h.checkpoint(path, nil); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestRestore(t *testing.T) {
	sockets := []*api.Socket{{
		Pid: 7, Fd: 3, Options: []*api.SocketOption{{Level: 6, Name: 18, Value: -1}, {Level: 6, Name: 13, Text: "reno"}},
		Memberships: []*api.Membership{{Interface: "eth0", Group: "ff02::7", Exclude: true, Sources: []string{"2001:db8::1"}}},
	}}
	path := imageSet(t, func(h *harness) {
		h.guest.Sockets = sockets
		h.guest.Addresses = []*api.Address{{Interface: "eth0", Address: "192.0.2.2"}, {Interface: "eth0", Address: "2001:db8::2"}}
	})
	h := newHarness(t)
	var staged []string
	h.kata.Before("Create", func(context.Context) error {
		entries, err := os.ReadDir(filepath.Join(h.exchange(), restoreDir))
		for _, e := range entries {
			staged = append(staged, e.Name())
		}
		return err
	})
	dir := h.create(nil, func(r *task.CreateTaskRequest) { r.Checkpoint = path })
	if !slices.Equal(staged, []string{"inventory.img", "pages-1.img"}) {
		t.Errorf("staged when Kata creates the container: %q", staged)
	}
	if got := h.kata.Request("Create").(*task.CreateTaskRequest).GetCheckpoint(); got != "" {
		t.Errorf("Kata got a checkpoint %q", got)
	}
	spec := readSpec(t, dir)
	p := spec.Process
	if !slices.Equal(p.Args, []string{"/dev/.kata-checkpoint", "placeholder"}) || p.Cwd != "/" || p.User.UID != 0 || !p.NoNewPrivileges {
		t.Errorf("process %+v", p)
	}
	if !slices.Equal(p.Capabilities.Bounding, []string{"CAP_CHOWN", "CAP_KILL"}) || !slices.Contains(p.Capabilities.Effective, "CAP_KILL") || !slices.Contains(p.Capabilities.Permitted, "CAP_KILL") {
		t.Errorf("capabilities %+v", p.Capabilities)
	}
	last := spec.Mounts[len(spec.Mounts)-1]
	if last.Destination != "/dev/.kata-checkpoint" || last.Source != filepath.Join(h.cfg.GuestBundle, api.AgentBinary) || !slices.Contains(last.Options, "ro") {
		t.Errorf("mount %+v", last)
	}
	h.guest.Before("Restore", func(context.Context) error {
		if !h.kata.Called("Start c1") {
			t.Error("restored before the placeholder runs")
		}
		h.wantStatus("CREATED")
		return nil
	})
	if _, err := h.task.Start(t.Context(), &task.StartRequest{ID: "c1"}); err != nil {
		t.Fatal(err)
	}
	h.wantStatus("RUNNING")
	h.wantCalls("the agent", h.guest.Calls(), "Adopt c1", "CheckRestore c1", "Restore c1")
	got := h.guest.Request("Restore").(*api.RestoreRequest)
	want := &api.RestoreRequest{
		ContainerId: "c1", Token: h.service.container("c1").exchange.token, Directory: restoreDir, CriuVersion: 40201,
		Options:    &api.CheckpointOptions{FileLocks: true},
		Externals:  []*api.External{{Name: "m0", Destination: "/data", Fstype: "virtiofs"}},
		Stdio:      []*api.Stdio{{Fd: 1, Key: "pipe:[7]"}},
		OpenFiles:  []*api.OpenFile{{Path: []byte("/data/f"), Size: 5}},
		Addresses:  []*api.Address{{Interface: "eth0", Address: "192.0.2.2"}, {Interface: "eth0", Address: "2001:db8::2"}},
		Sockets:    sockets,
		Attributes: []*api.Attribute{{Pid: 1, Name: "cpus", Value: "0"}},
		Rights:     &api.Rights{Capabilities: []string{"CAP_CHOWN"}, NoNewPrivs: true, Uid: 1000},
	}
	if !proto.Equal(got, want) {
		t.Errorf("restore %v, want %v", got, want)
	}
	if exists(filepath.Join(h.exchange(), restoreDir)) {
		t.Error("the staged images are left")
	}
	if !exists(filepath.Join(path, imageset.ManifestName)) {
		t.Error("the checkpoint itself is gone")
	}

	// It is checkpointed like any other, as what it was.
	again := t.TempDir()
	if err := h.checkpoint(again, nil); err != nil {
		t.Fatal(err)
	}
	set, err := imageset.Open(again)
	if err != nil {
		t.Fatal(err)
	}
	defer set.Close()
	if !slices.Equal(set.Manifest.Container.Args, []string{"sh", "-c", "work"}) {
		t.Errorf("args %q", set.Manifest.Container.Args)
	}
}

func TestRestoreRefusedBeforeKatasCreate(t *testing.T) {
	good := imageSet(t)
	damaged := imageSet(t)
	if err := os.WriteFile(filepath.Join(damaged, "pages-1.img"), []byte(strings.Repeat("q", 4096)), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		path     string
		change   func(*specs.Spec)
		terminal bool
		prepare  option
		want     []string
	}{
		"no image set":     {path: t.TempDir(), want: []string{"not an image set"}},
		"a damaged one":    {path: damaged, want: []string{"pages-1.img is damaged"}},
		"other arguments":  {path: good, change: func(s *specs.Spec) { s.Process.Args = []string{"sleep"} }, want: []string{"`sh -c work`", "`sleep`"}},
		"a lacking volume": {path: good, change: func(s *specs.Spec) { s.Mounts = s.Mounts[:1] }, want: []string{"/data"}},
		"a terminal":       {path: good, terminal: true, want: []string{"terminal"}},
		"both":             {path: good, terminal: true, change: func(s *specs.Spec) { s.Process.Args = []string{"sleep"} }, want: []string{"terminal", "`sleep`"}},
		"a pod's sandbox":  {path: good, change: func(s *specs.Spec) { s.Annotations["io.kubernetes.cri.container-type"] = "sandbox" }, want: []string{"sandbox"}},
		"no guest bundle on the host": {path: good, prepare: withConfig(func(c *config.Config) {
			os.Remove(filepath.Join(c.GuestBundle, api.AgentBinary))
		}), want: []string{api.AgentBinary, "guest_bundle"}},
	} {
		t.Run(name, func(t *testing.T) {
			var options []option
			if tc.prepare != nil {
				options = append(options, tc.prepare)
			}
			h := newHarness(t, options...)
			_, err := h.task.Create(t.Context(), &task.CreateTaskRequest{ID: "c1", Bundle: h.bundle(tc.change), Checkpoint: tc.path, Terminal: tc.terminal})
			wantError(t, err, tc.want...)
			h.wantCalls("Kata", h.kata.Calls())
			if exists(h.exchange()) {
				t.Error("the exchange directory is left")
			}
			// From the good copy it works right after.
			h = newHarness(t)
			h.create(nil, func(r *task.CreateTaskRequest) { r.Checkpoint = good })
		})
	}
}

func TestRestoreThatFailsLeavesNothingAlive(t *testing.T) {
	for _, method := range []string{"CheckRestore", "Restore"} {
		t.Run(method, func(t *testing.T) {
			path := imageSet(t)
			h := newHarness(t)
			h.create(nil, func(r *task.CreateTaskRequest) { r.Checkpoint = path })
			h.guest.Before(method, func(context.Context) error {
				return errclass.ToRPC(errclass.Precondition(errcode.FilesChanged, "/data/f has grown"))
			})
			h.kata.Before("Kill", func(context.Context) error {
				h.wantStatus("CREATED") // the placeholder is nothing to show
				return nil
			})
			_, err := h.task.Start(t.Context(), &task.StartRequest{ID: "c1"})
			kept := filepath.Join(h.cfg.StateDir, restoreLogs, "ns-c1.log")
			want := fmt.Sprintf("restore container c1 from %s: /data/f has grown", path)
			if method == "Restore" { // CRIU has run
				want += "; CRIU's log is in " + kept
				if log, err := os.ReadFile(kept); err != nil || string(log) != fake.FailedLog {
					t.Errorf("the log is %q (%v)", log, err)
				}
			} else if exists(kept) {
				t.Error("CRIU has not run, and there is a log")
			}
			want += " (" + errcode.FilesChanged.String() + ")" // once, and in the end
			if got := errgrpc.ToNative(err).Error(); got != want {
				t.Errorf("the error is %q, not %q", got, want)
			}
			h.wantStatus("STOPPED")
			if _, err := h.task.Delete(t.Context(), &task.DeleteRequest{ID: "c1"}); err != nil {
				t.Fatal(err)
			}
			if exists(h.exchange()) {
				t.Error("the exchange directory is left")
			}
		})
	}
}

func TestKeepNewest(t *testing.T) {
	dir := t.TempDir()
	now := time.Now()
	for i, name := range []string{"c", "a", "b"} { // from the newest on
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(filepath.Join(dir, name), now, now.Add(-time.Duration(i)*time.Minute)); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		n    int
		want []string
	}{{3, []string{"a", "b", "c"}}, {2, []string{"a", "c"}}} {
		if err := keepNewest(dir, tc.n); err != nil {
			t.Fatal(err)
		}
		wantFiles(t, dir, tc.want...)
	}
}

func TestTemporaryCopyOfContainerdIsRemoved(t *testing.T) {
	temp := t.TempDir()
	t.Setenv("XDG_RUNTIME_DIR", "")
	t.Setenv("TMPDIR", temp)
	lay := func(dir string) string {
		if err := os.Rename(imageSet(t), dir); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	// Beside containerd's copy lies what anybody may have put there.
	if err := os.WriteFile(filepath.Join(temp, imageset.RootfsDiffName), []byte("planted"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		dir  string
		gone bool
	}{
		{filepath.Join(temp, "ctrd-checkpoint123"), true},
		{filepath.Join(temp, "ctrd-checkpoint"), false},
		{filepath.Join(temp, "ctrd-checkpoint-mine"), false},
		{filepath.Join(t.TempDir(), "ctrd-checkpoint123"), false},
	} {
		if filepath.Dir(tc.dir) == temp && !tc.gone {
			os.Remove(filepath.Join(temp, imageset.RootfsDiffName))
		}
		path := lay(tc.dir)
		h := newHarness(t)
		h.create(nil, func(r *task.CreateTaskRequest) { r.Checkpoint = path })
		if exists(path) == tc.gone {
			t.Errorf("%s: there %v", path, exists(path))
		}
	}
}

// Also where Create fails before it looks at the checkpoint.
func TestTemporaryCopyOfContainerdIsRemovedByACreateThatFails(t *testing.T) {
	temp := t.TempDir()
	t.Setenv("XDG_RUNTIME_DIR", "")
	t.Setenv("TMPDIR", temp)
	for name, prepare := range map[string]func(h *harness, dir string){
		"no exchange directory": func(h *harness, _ string) { h.cfg.StateDir = filepath.Join(temp, "a file", "below it") },
		"no bundle":             func(_ *harness, dir string) { _ = os.Remove(filepath.Join(dir, "config.json")) },
	} {
		path := filepath.Join(temp, "ctrd-checkpoint123")
		if err := errors.Join(os.Mkdir(path, 0o700), os.WriteFile(filepath.Join(temp, "a file"), nil, 0o600)); err != nil {
			t.Fatal(err)
		}
		h := newHarness(t)
		dir := h.bundle(nil)
		prepare(h, dir)
		if _, err := h.task.Create(t.Context(), &task.CreateTaskRequest{ID: "c1", Bundle: dir, Checkpoint: path}); err == nil {
			t.Errorf("%s: created", name)
		}
		if exists(path) {
			t.Errorf("%s: the copy is still there", name)
			os.RemoveAll(path)
		}
	}
}

func TestExecIntoARestoredContainer(t *testing.T) {
	path := imageSet(t)
	h := newHarness(t)
	h.create(nil, func(r *task.CreateTaskRequest) { r.Checkpoint = path })
	if _, err := h.task.Start(t.Context(), &task.StartRequest{ID: "c1"}); err != nil {
		t.Fatal(err)
	}
	asked := &specs.Process{Args: []string{"id"}, Cwd: "/home", User: specs.User{UID: 7}, Terminal: true, ConsoleSize: &specs.Box{Height: 3, Width: 4}}
	value, err := json.Marshal(asked)
	if err != nil {
		t.Fatal(err)
	}
	r := &task.ExecProcessRequest{ID: "c1", ExecID: "e", Terminal: true, Stdout: "out", Spec: &anypb.Any{TypeUrl: "types.containerd.io/opencontainers/runtime-spec/1/Process", Value: value}}
	if _, err := h.task.Exec(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	got := h.kata.Request("Exec").(*task.ExecProcessRequest)
	helper := &specs.Process{}
	if err := json.Unmarshal(got.GetSpec().GetValue(), helper); err != nil {
		t.Fatal(err)
	}
	if len(helper.Args) != 3 || helper.Args[0] != api.HelperPath || helper.Args[1] != "exec" || len(helper.Args[2]) < 16 || helper.Cwd != "/" || helper.User.UID != 0 || !helper.Terminal || helper.ConsoleSize == nil {
		t.Errorf("helper %+v", helper)
	}
	if got.Stdout != "out" || !got.Terminal || got.GetSpec().GetTypeUrl() != r.Spec.TypeUrl {
		t.Errorf("request %v", got)
	}
	if _, err := h.task.Start(t.Context(), &task.StartRequest{ID: "c1", ExecID: "e"}); err != nil {
		t.Fatal(err)
	}
	exec := h.guest.Request("Exec").(*api.ExecRequest)
	if exec.GetContainerId() != "c1" || exec.GetHelperToken() != helper.Args[2] || string(exec.GetProcess()) != string(value) {
		t.Errorf("the agent got %v", exec)
	}

	// What the agent refuses leaves no helper.
	h.guest.Before("Exec", func(context.Context) error {
		return errgrpc.ToGRPCf(errdefs.ErrNotFound, "no such program")
	})
	r.ExecID = "f"
	if _, err := h.task.Exec(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	_, err = h.task.Start(t.Context(), &task.StartRequest{ID: "c1", ExecID: "f"})
	wantError(t, err, "exec f in container c1", "no such program")
	if !h.kata.Called("Kill c1 f") {
		t.Error("the helper is left")
	}
}
