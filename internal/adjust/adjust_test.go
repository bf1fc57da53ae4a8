// SPDX-License-Identifier: Apache-2.0

package adjust

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
)

const stateDir = "/var/lib/kata-checkpoint"

func exchangeMount(source string) specs.Mount {
	return specs.Mount{Destination: "/.kata-checkpoint", Type: "bind", Source: source, Options: []string{"rbind", "rprivate", "rw"}}
}

func TestAdjust(t *testing.T) {
	own := exchangeMount("/var/lib/kata-checkpoint/exchange/k8s.io--c1")
	proc := specs.Mount{Destination: "/proc", Type: "proc", Source: "proc"}
	shm := specs.Mount{Destination: "/dev/shm", Type: "tmpfs", Source: "shm"}
	hosts := specs.Mount{Destination: "/etc/hosts", Type: "bind", Source: "/x/hosts", Options: []string{"rbind", "ro"}}
	// nerdctl writes no type for its binds.
	untyped := specs.Mount{Destination: "/data/", Source: "/x/data", Options: []string{"bind"}}
	tmpfs := specs.Mount{Destination: "/tmp", Type: "tmpfs", Source: "tmpfs"}
	comma := specs.Mount{Destination: "/a,b", Type: "bind", Source: "/x"}

	for name, tc := range map[string]struct {
		annotations map[string]string
		mounts      []specs.Mount
		want        Adjustment
		err         string
	}{
		"nothing there": {want: Adjustment{Mounts: []specs.Mount{own}}},
		"what is external is said": {
			mounts: []specs.Mount{proc, shm, hosts, untyped, tmpfs},
			want:   Adjustment{Mounts: []specs.Mount{own}, Annotations: map[string]string{annotations.ExternalMountsKey: "/data,/dev/shm,/etc/hosts"}},
		},
		"the user's own are kept": {
			annotations: map[string]string{annotations.ExternalMountsKey: " /tmp , /etc/hosts", "other": "x"},
			mounts:      []specs.Mount{hosts, shm, tmpfs},
			want:        Adjustment{Mounts: []specs.Mount{own}, Annotations: map[string]string{annotations.ExternalMountsKey: "/dev/shm,/etc/hosts,/tmp"}},
		},
		"a path that the list cannot hold": {mounts: []specs.Mount{comma}, want: Adjustment{Mounts: []specs.Mount{own}}},
		"adjusted already": {
			annotations: map[string]string{annotations.ExternalMountsKey: "/etc/hosts"},
			mounts:      []specs.Mount{hosts, own},
		},
		"another directory at the destination":  {mounts: []specs.Mount{exchangeMount("/tmp/x")}, err: "mount of its own at /.kata-checkpoint"},
		"another container's exchange":          {mounts: []specs.Mount{exchangeMount("/var/lib/kata-checkpoint/exchange/k8s.io--c2")}, err: "mount of its own"},
		"a mount below the destination":         {mounts: []specs.Mount{{Destination: "/.kata-checkpoint/x", Type: "tmpfs"}}, err: "/.kata-checkpoint/x"},
		"the destination by a roundabout path":  {mounts: []specs.Mount{{Destination: "/a/../.kata-checkpoint", Type: "tmpfs"}}, err: "mount of its own"},
		"a name that only begins like it":       {mounts: []specs.Mount{{Destination: "/.kata-checkpoint-x", Type: "tmpfs"}}, want: Adjustment{Mounts: []specs.Mount{own}}},
		"an annotation with a relative path":    {annotations: map[string]string{annotations.ExternalMountsKey: "x"}, err: `"x" is not an absolute path`},
		"an annotation that names the root":     {annotations: map[string]string{annotations.ExternalMountsKey: "/a/.."}, err: "root file system"},
		"an annotation with nothing but commas": {annotations: map[string]string{annotations.ExternalMountsKey: ",, "}, want: Adjustment{Mounts: []specs.Mount{own}}},
	} {
		t.Run(name, func(t *testing.T) {
			c := Container{Namespace: "k8s.io", ID: "c1", Annotations: tc.annotations, Mounts: tc.mounts}
			got, err := Adjust(c, stateDir)
			if tc.err != "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) {
					t.Fatalf("got %v, error %v; want an error with %q", got, err, tc.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(&tc.want, got); diff != "" {
				t.Fatalf("-want +got:\n%s", diff)
			}
			c.Annotations, c.Mounts = got.Apply(c.Annotations, c.Mounts)
			again, err := Adjust(c, stateDir)
			if err != nil {
				t.Fatal(err)
			}
			if !again.Empty() {
				t.Errorf("adjusting twice changes more: %+v", again)
			}
		})
	}
}

func TestExchangeDirIsUnambiguous(t *testing.T) {
	// Both are valid identifiers of containerd, dashes included.
	if a, b := ExchangeDir(stateDir, "a", "b-c"), ExchangeDir(stateDir, "a-b", "c"); a == b {
		t.Errorf("two containers share %s", a)
	}
}
