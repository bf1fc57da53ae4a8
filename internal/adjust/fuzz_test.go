// SPDX-License-Identifier: Apache-2.0

package adjust

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
)

// A spec that was adjusted needs nothing more, and has one exchange mount.
func FuzzAdjust(f *testing.F) {
	f.Add("k8s.io", "c1", "/data,/etc/hosts", "/data", "bind", "/dev/shm", "tmpfs")
	f.Add("n", "a-b", "", "/data/", "rbind", "/a,b", "bind")
	f.Add("n", "c", "x", api.ExchangeDestination, "bind", api.ExchangeDestination+"/below", "bind")
	f.Add("n", "c", ",/a,,/a", "relative", "bind", "/a/../b", "bind")
	f.Fuzz(func(t *testing.T, namespace, id, external, one, oneType, two, twoType string) {
		c := Container{
			Namespace: namespace, ID: id, Annotations: map[string]string{annotations.ExternalMountsKey: external},
			Mounts: []specs.Mount{{Destination: one, Type: oneType, Source: "/x"}, {Destination: two, Type: "other", Options: []string{twoType}}},
		}
		first, err := Adjust(c, "/state")
		if err != nil {
			return
		}
		c.Annotations, c.Mounts = first.Apply(c.Annotations, c.Mounts)
		again, err := Adjust(c, "/state")
		if err != nil {
			t.Fatalf("what was adjusted is refused: %v", err)
		}
		if !again.Empty() {
			t.Errorf("what was adjusted needs more:\n%s", cmp.Diff(&Adjustment{}, again))
		}
		n := 0
		for _, m := range c.Mounts {
			if m.Source == ExchangeDir("/state", namespace, id) {
				n++
			}
		}
		if n != 1 {
			t.Errorf("%d exchange mounts", n)
		}
	})
}
