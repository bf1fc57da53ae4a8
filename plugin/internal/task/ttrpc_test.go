// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/fake"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/kata"
)

var allMethods = []string{
	"State", "Create", "Start", "Delete", "Pids", "Pause", "Resume", "Checkpoint", "Kill",
	"Exec", "ResizePty", "CloseIO", "Update", "Wait", "Stats", "Connect", "Shutdown",
}

// rawKata answers every method with a message of its own making, and keeps
// what it got.
type rawKata struct {
	mu       sync.Mutex
	got      map[string][]byte
	metadata ttrpc.MD
	deadline time.Time
	answer   []byte
}

func withRawKata(raw *rawKata) option {
	return func(h *harness) {
		server, err := ttrpc.NewServer()
		if err != nil {
			h.t.Fatal(err)
		}
		raw.got = make(map[string][]byte)
		methods := make(map[string]ttrpc.Method)
		for _, name := range allMethods {
			methods[name] = func(ctx context.Context, unmarshal func(any) error) (any, error) {
				var req, resp emptypb.Empty
				if err := unmarshal(&req); err != nil {
					return nil, err
				}
				raw.mu.Lock()
				defer raw.mu.Unlock()
				raw.got[name] = req.ProtoReflect().GetUnknown()
				raw.metadata, _ = ttrpc.GetMetadata(ctx)
				raw.deadline, _ = ctx.Deadline()
				resp.ProtoReflect().SetUnknown(raw.answer)
				return &resp, nil
			}
		}
		server.RegisterService("containerd.task.v2.Task", &ttrpc.ServiceDesc{Methods: methods})
		h.kata.Endpoint = kata.Endpoint{Address: h.kata.Endpoint.Address + "-raw", Version: 2}
		fake.Serve(h.t, server, h.kata.Endpoint.Path())
	}
}

// unknown is a field that no version of the API has.
func unknown(b []byte) []byte {
	b = protowire.AppendTag(b, 4242, protowire.BytesType)
	return protowire.AppendString(b, "of a later version")
}

// Every method of the API reaches Kata's under both names of the service, with
// fields that this build does not know, metadata and deadline; so do the
// answers.
func TestProxyForwardsEverything(t *testing.T) {
	// The field id, number 1, is a string in all requests.
	id := protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), "of-nobody")
	for _, service := range services {
		raw := &rawKata{answer: unknown(nil)}
		h := newHarness(t, withRawKata(raw))
		for _, method := range allMethods {
			switch method {
			case "Create", "Checkpoint": // need a bundle, and a container
				continue
			}
			t.Run(service+"/"+method, func(t *testing.T) {
				var req, resp emptypb.Empty
				req.ProtoReflect().SetUnknown(unknown(slices.Clone(id)))
				ctx, cancel := context.WithTimeout(t.Context(), waitLimit)
				defer cancel()
				md := ttrpc.MD{}
				md.Set("containerd-namespace-ttrpc", "ns")
				if err := h.conn.Call(ttrpc.WithMetadata(ctx, md), service, method, &req, &resp); err != nil {
					t.Fatal(err)
				}
				if got := resp.ProtoReflect().GetUnknown(); !slices.Equal(got, raw.answer) {
					t.Errorf("answer %x, want %x", got, raw.answer)
				}
				raw.mu.Lock()
				defer raw.mu.Unlock()
				if got, want := raw.got[method], unknown(slices.Clone(id)); !slices.Equal(got, want) {
					t.Errorf("request %x, want %x", got, want)
				}
				if got, _ := raw.metadata.Get("containerd-namespace-ttrpc"); !slices.Equal(got, []string{"ns"}) {
					t.Errorf("metadata %q", got)
				}
				if want, _ := ctx.Deadline(); raw.deadline.IsZero() || raw.deadline.After(want.Add(time.Second)) {
					t.Errorf("deadline %s, want %s", raw.deadline, want)
				}
			})
		}
	}
}

// Calls that are always Kata's bypass the server, and no others.
func TestBypasses(t *testing.T) {
	h := newHarness(t)
	sigkill, sigterm := uint32(syscall.SIGKILL), uint32(syscall.SIGTERM)
	passes := func(method string, req proto.Message) bool {
		t.Helper()
		payload, err := proto.Marshal(req)
		if err != nil {
			t.Fatal(err)
		}
		return h.service.bypasses(&ttrpc.Request{Service: services[0], Method: method, Payload: payload})
	}
	kill := func(want bool, when string, r *task.KillRequest) {
		t.Helper()
		if got := passes("Kill", r); got != want {
			t.Errorf("Kill %d of %q %q, %s: bypasses %t", r.Signal, r.ID, r.ExecID, when, got)
		}
	}
	for _, method := range allMethods {
		if want := slices.Contains([]string{"Stats", "Update", "ResizePty", "Kill"}, method); passes(method, &emptypb.Empty{}) != want {
			t.Errorf("%s passes: %t", method, !want)
		}
	}
	if h.service.bypasses(&ttrpc.Request{Service: services[1], Method: "Stats"}) {
		t.Error("a call under a name that Kata does not serve bypasses the server")
	}

	h.create(nil)
	kill(false, "created", &task.KillRequest{ID: "c1", Signal: sigkill})
	kill(true, "created", &task.KillRequest{ID: "c1", Signal: sigterm})
	kill(true, "created", &task.KillRequest{ID: "c1", ExecID: "e", Signal: sigkill})
	kill(true, "created", &task.KillRequest{ID: "c2", Signal: sigkill})
	if _, err := h.task.Start(t.Context(), &task.StartRequest{ID: "c1"}); err != nil {
		t.Fatal(err)
	}
	kill(true, "running", &task.KillRequest{ID: "c1", Signal: sigkill})

	h = newHarness(t)
	h.create(nil)
	if _, err := h.task.Kill(t.Context(), &task.KillRequest{ID: "c1", Signal: sigkill}); err != nil {
		t.Fatal(err)
	}
	kill(false, "abandoned", &task.KillRequest{ID: "c1", Signal: sigterm})
}

func TestProxyKeepsUnknownFieldsOfCreate(t *testing.T) {
	raw := &rawKata{}
	h := newHarness(t, withRawKata(raw))
	r := &task.CreateTaskRequest{ID: "c1", Bundle: h.bundle(nil), Stdout: "out"}
	r.ProtoReflect().SetUnknown(unknown(nil))
	if _, err := h.task.Create(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	got := &task.CreateTaskRequest{}
	if err := proto.Unmarshal(raw.got["Create"], got); err != nil {
		t.Fatal(err)
	}
	if !proto.Equal(got, r) {
		t.Errorf("Kata got %v, want %v", got, r)
	}
}

// Never Unimplemented: containerd takes it for an older shim and asks again in
// another way.
func TestNoMethodIsUnimplemented(t *testing.T) {
	h := newHarness(t)
	for _, service := range services {
		for _, method := range allMethods {
			if method == "Wait" || method == "Shutdown" {
				continue
			}
			err := h.conn.Call(t.Context(), service, method, &emptypb.Empty{}, &emptypb.Empty{})
			if status.Code(err) == codes.Unimplemented {
				t.Errorf("%s/%s: %v", service, method, err)
			}
		}
	}
}

func TestKatasErrorsComeThrough(t *testing.T) {
	h := newHarness(t)
	h.run(nil)
	h.kata.Before("Stats", func(context.Context) error {
		return errgrpc.ToGRPCf(errdefs.ErrAborted, "so said Kata")
	})
	_, err := h.task.Stats(t.Context(), &task.StatsRequest{ID: "c1"})
	if st, _ := status.FromError(err); st.Code() != codes.Aborted || st.Message() != "so said Kata: aborted" {
		t.Errorf("got %v", err)
	}
	_, err = h.task.State(t.Context(), &task.StateRequest{ID: "c2"})
	if status.Code(err) != codes.NotFound {
		t.Errorf("got %v", err)
	}
}

// A Wait that lasts as long as the container blocks nothing.
func TestLongWaitsBlockNothing(t *testing.T) {
	h := newHarness(t)
	h.run(nil)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for i := range 50 {
		wg.Go(func() { _, _ = h.task.Wait(ctx, &task.WaitRequest{ID: "c1", ExecID: fmt.Sprint(i % 2)}) })
	}
	eventually(t, "the Waits reach Kata", func() bool { return h.kata.Called("Wait c1 0") && h.kata.Called("Wait c1 1") })
	if _, err := h.task.Stats(t.Context(), &task.StatsRequest{ID: "c1"}); err != nil {
		t.Error(err)
	}
	if got := h.status(); got != "RUNNING" {
		t.Error(got)
	}
	cancel()
	wg.Wait()
}

func TestKataDies(t *testing.T) {
	h := newHarness(t)
	h.run(nil)
	h.kata.Before("Stats", func(ctx context.Context) error {
		h.kata.Die()
		<-ctx.Done()
		return ctx.Err()
	})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	answer := make(chan error, 1)
	go func() {
		_, err := h.task.Stats(ctx, &task.StatsRequest{ID: "c1"})
		answer <- err
	}()
	select {
	case <-h.down.Done():
	case <-time.After(waitLimit):
		t.Fatal("the service does not end with Kata's shim")
	}
	// To containerd an answer is one of a shim that lives. What it must see is
	// the end of the connection, which the daemon makes.
	select {
	case err := <-answer:
		t.Errorf("answered with %v, want no answer", err)
	case <-time.After(100 * time.Millisecond):
	}
}

func TestShutdown(t *testing.T) {
	t.Run("keeps running while Kata does", func(t *testing.T) {
		h := newHarness(t)
		h.run(nil)
		if _, err := h.task.Shutdown(t.Context(), &task.ShutdownRequest{ID: "c2"}); err != nil {
			t.Fatal(err)
		}
		if h.down.Err() != nil || h.status() != "RUNNING" {
			t.Error("the service has ended")
		}
	})
	t.Run("ends with a Kata that ends before it answers", func(t *testing.T) {
		h := newHarness(t)
		h.kata.Before("Shutdown", func(ctx context.Context) error {
			h.kata.Die()
			<-ctx.Done()
			return ctx.Err()
		})
		shutDown(t, h)
	})
	t.Run("ends with a Kata that ends after its answer", func(t *testing.T) {
		h := newHarness(t)
		h.kata.Before("Shutdown", func(context.Context) error {
			go h.kata.Die() // the connection ends once it is idle
			return nil
		})
		shutDown(t, h)
	})
}

// Kata's Rust shim stays when it cannot clean up, and so would a container that
// no engine could delete.
func TestShutdownEndsAKataThatCannot(t *testing.T) {
	refuse := func(context.Context) error { return errors.New("failed to remove rw path: Device or resource busy") }
	t.Run("once its container was abandoned", func(t *testing.T) {
		h := newHarness(t)
		h.create(nil)
		if _, err := h.task.Kill(t.Context(), &task.KillRequest{ID: "c1", Signal: uint32(syscall.SIGKILL)}); err != nil {
			t.Fatal(err)
		}
		if _, err := h.task.Delete(t.Context(), &task.DeleteRequest{ID: "c1"}); err != nil {
			t.Fatal(err)
		}
		h.kata.Before("Shutdown", refuse)
		shutDown(t, h)
	})
	t.Run("and no other", func(t *testing.T) {
		h := newHarness(t)
		h.run(nil)
		h.kata.Before("Shutdown", refuse)
		if _, err := h.task.Shutdown(t.Context(), &task.ShutdownRequest{ID: "c1"}); err == nil {
			t.Error("Kata's refusal is not passed on")
		}
		if h.down.Err() != nil || h.status() != "RUNNING" {
			t.Error("the service has ended")
		}
	})
}

func shutDown(t *testing.T, h *harness) {
	t.Helper()
	if _, err := h.task.Shutdown(t.Context(), &task.ShutdownRequest{ID: "c1"}); err != nil {
		t.Fatalf("Shutdown: %v", err)
	}
	select {
	case <-h.unlinked:
	default:
		t.Error("answered before the sockets were removed")
	}
	select {
	case <-h.down.Done():
	case <-time.After(waitLimit):
		t.Fatal("the service does not end")
	}
}
