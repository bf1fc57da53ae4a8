// SPDX-License-Identifier: Apache-2.0

package nri

import (
	"context"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/nri/pkg/api"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/kata-checkpoint/kata-checkpoint/internal/adjust"
	"github.com/kata-checkpoint/kata-checkpoint/internal/config"
	"github.com/kata-checkpoint/kata-checkpoint/internal/version"
)

func testConfig() *config.Config {
	return &config.Config{StateDir: "/state", NRIRuntimeHandlers: []string{"kata-checkpoint", "other-name-of-ours"}}
}

func exchangeMount(id string) *api.Mount {
	return &api.Mount{Destination: "/.kata-checkpoint", Type: "bind", Source: "/state/exchange/k8s.io--" + id, Options: []string{"rbind", "rprivate", "rw"}}
}

func TestAdjustment(t *testing.T) {
	marker := map[string]string{"kata-checkpoint.dev/nri": version.Version}
	with := func(annotations map[string]string) *api.ContainerAdjustment {
		maps.Copy(annotations, marker)
		return &api.ContainerAdjustment{Annotations: annotations, Mounts: []*api.Mount{exchangeMount("c1")}}
	}
	shm := &api.Mount{Destination: "/dev/shm", Type: "bind", Source: "/run/shm", Options: []string{"rbind", "ro"}}
	proc := &api.Mount{Destination: "/proc", Type: "proc", Source: "proc"}

	for name, tc := range map[string]struct {
		handlers []string
		handler  string
		pod      map[string]string
		own      map[string]string
		mounts   []*api.Mount
		want     *api.ContainerAdjustment
		err      string
	}{
		"another runtime":              {handler: "runc", pod: map[string]string{"kata-checkpoint.dev/after": "stop"}},
		"another runtime of Kata's":    {handler: "kata"},
		"no handler":                   {handler: ""},
		"no handler, and it is ours":   {handlers: []string{""}, handler: "", want: with(map[string]string{})},
		"ours":                         {handler: "kata-checkpoint", want: with(map[string]string{})},
		"ours by another name":         {handler: "other-name-of-ours", want: with(map[string]string{})},
		"mounts that are external":     {handler: "kata-checkpoint", mounts: []*api.Mount{proc, shm}, want: with(map[string]string{"kata-checkpoint.dev/external-mounts": "/dev/shm"})},
		"another plugin's before ours": {handler: "kata-checkpoint", own: map[string]string{"other": "x"}, want: with(map[string]string{})},
		"the pod's annotations": {
			handler: "kata-checkpoint",
			pod:     map[string]string{"kata-checkpoint.dev/after": "stop", "kata-checkpoint.dev/tcp": "close", "kata-checkpoint.developer/x": "y", "io.katacontainers.x": "y"},
			want:    with(map[string]string{"kata-checkpoint.dev/after": "stop", "kata-checkpoint.dev/tcp": "close"}),
		},
		"the container's beat the pod's": {
			handler: "kata-checkpoint",
			pod:     map[string]string{"kata-checkpoint.dev/after": "stop"},
			own:     map[string]string{"kata-checkpoint.dev/after": "leave-running"},
			want:    with(map[string]string{}),
		},
		"the pod's external mounts and those that are found": {
			handler: "kata-checkpoint",
			pod:     map[string]string{"kata-checkpoint.dev/external-mounts": "/cache"},
			mounts:  []*api.Mount{shm},
			want:    with(map[string]string{"kata-checkpoint.dev/external-mounts": "/cache,/dev/shm"}),
		},
		"the container's external mounts and those that are found": {
			handler: "kata-checkpoint",
			pod:     map[string]string{"kata-checkpoint.dev/external-mounts": "/cache"},
			own:     map[string]string{"kata-checkpoint.dev/external-mounts": "/tmp"},
			mounts:  []*api.Mount{shm},
			want:    with(map[string]string{"kata-checkpoint.dev/external-mounts": "/dev/shm,/tmp"}),
		},
		"a marker in the pod":     {handler: "kata-checkpoint", pod: map[string]string{"kata-checkpoint.dev/nri": "mine"}, want: with(map[string]string{})},
		"a relative external":     {handler: "kata-checkpoint", pod: map[string]string{"kata-checkpoint.dev/external-mounts": "x"}, err: `"x" is not an absolute path`},
		"a mount of the user's":   {handler: "kata-checkpoint", mounts: []*api.Mount{{Destination: "/.kata-checkpoint", Type: "tmpfs"}}, err: "mount it elsewhere"},
		"one in a pod of another": {handler: "runc", mounts: []*api.Mount{{Destination: "/.kata-checkpoint", Type: "tmpfs"}}},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := testConfig()
			if tc.handlers != nil {
				cfg.NRIRuntimeHandlers = tc.handlers
			}
			pod := &api.PodSandbox{Name: "web", Namespace: "shop", RuntimeHandler: tc.handler, Annotations: tc.pod}
			c := &api.Container{Id: "c1", Name: "nginx", Annotations: tc.own, Mounts: tc.mounts}
			got, updates, err := New(cfg).CreateContainer(t.Context(), pod, c)
			if len(updates) > 0 {
				t.Errorf("changes other containers: %v", updates)
			}
			if tc.err != "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) || !strings.Contains(err.Error(), "container nginx of pod shop/web") {
					t.Fatalf("got %v, error %v; want an error with %q", got, err, tc.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tc.want, got, protocmp.Transform()); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

// The shim adjusts every container, adjusted or not, by the same function.
func TestShimHasNothingToAdd(t *testing.T) {
	c := &api.Container{Id: "c1", Mounts: []*api.Mount{{Destination: "/data", Type: "bind", Source: "/x"}}}
	a, _, err := New(testConfig()).CreateContainer(context.Background(), &api.PodSandbox{RuntimeHandler: "kata-checkpoint"}, c)
	if err != nil {
		t.Fatal(err)
	}
	left, err := adjust.Adjust(adjust.Container{
		Namespace: "k8s.io", ID: "c1", Annotations: a.GetAnnotations(), Mounts: ociMounts(slices.Concat(c.GetMounts(), a.GetMounts())),
	}, "/state")
	if err != nil {
		t.Fatal(err)
	}
	if !left.Empty() {
		t.Errorf("it would add %+v", left)
	}
}
