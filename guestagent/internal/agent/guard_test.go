// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
)

// Another process of the host may connect, and gets nothing done to a container.
func TestARequestWithoutTheTokenIsRefused(t *testing.T) {
	a, c := sleeping(t)
	c.Token = "secret"
	if err := a.save(c); err != nil {
		t.Fatal(err)
	}
	agent := client(t, a)
	for _, token := range []string{"", "secre", "secret ", "other"} {
		for name, call := range map[string]func() error{
			"Adopt": func() error {
				_, err := agent.Adopt(t.Context(), &api.AdoptRequest{ContainerId: c.ID, Token: token})
				return err
			},
			"Forget": func() error {
				_, err := agent.Forget(t.Context(), &api.ContainerRequest{ContainerId: c.ID, Token: token})
				return err
			},
			"Freeze": func() error {
				_, err := agent.Freeze(t.Context(), &api.ContainerRequest{ContainerId: c.ID, Token: token})
				return err
			},
			"Thaw": func() error {
				_, err := agent.Thaw(t.Context(), &api.ContainerRequest{ContainerId: c.ID, Token: token})
				return err
			},
			"CheckCheckpoint": func() error {
				_, err := agent.CheckCheckpoint(t.Context(), &api.CheckpointRequest{ContainerId: c.ID, Token: token})
				return err
			},
			"Checkpoint": func() error {
				_, err := agent.Checkpoint(t.Context(), &api.CheckpointRequest{ContainerId: c.ID, Token: token})
				return err
			},
			"Discard": func() error {
				_, err := agent.Discard(t.Context(), &api.DiscardRequest{ContainerId: c.ID, Token: token})
				return err
			},
			"CheckRestore": func() error {
				_, err := agent.CheckRestore(t.Context(), &api.RestoreRequest{ContainerId: c.ID, Token: token})
				return err
			},
			"Restore": func() error {
				_, err := agent.Restore(t.Context(), &api.RestoreRequest{ContainerId: c.ID, Token: token})
				return err
			},
			"Exec": func() error {
				_, err := agent.Exec(t.Context(), &api.ExecRequest{ContainerId: c.ID, Token: token})
				return err
			},
		} {
			if err := errgrpc.ToNative(call()); !errdefs.IsPermissionDenied(err) {
				t.Errorf("%s with the token %q: %v", name, token, err)
			}
		}
	}
	if isFrozen(t, c) {
		t.Error("it was frozen")
	}
	r := &api.ContainerRequest{ContainerId: c.ID, Token: "secret"}
	if _, err := agent.Freeze(t.Context(), r); err != nil {
		t.Error(err)
	}
	if _, err := agent.Thaw(t.Context(), r); err != nil {
		t.Error(err)
	}
}

// A shim of the release before sends no token, and is served.
func TestAShimOfTheReleaseBeforeIsServed(t *testing.T) {
	a, c := sleeping(t)
	agent := client(t, a)
	r := &api.ContainerRequest{ContainerId: c.ID}
	if _, err := agent.Freeze(t.Context(), r); err != nil {
		t.Error(err)
	}
	if _, err := agent.Thaw(t.Context(), r); err != nil {
		t.Error(err)
	}
}

// No request for a container is without a token.
func TestEveryRequestForAContainerHasAToken(t *testing.T) {
	methods := api.File_internal_api_agent_proto.Services().ByName("Agent").Methods()
	for i := range methods.Len() {
		in := methods.Get(i).Input()
		if in.Fields().ByName("container_id") == nil {
			continue
		}
		if token := in.Fields().ByName("token"); token == nil || token.Kind() != protoreflect.StringKind {
			t.Errorf("%s has none", methods.Get(i).Name())
		}
	}
}
