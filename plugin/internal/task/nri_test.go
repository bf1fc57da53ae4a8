// SPDX-License-Identifier: Apache-2.0

package task

import (
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/log"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
)

// Without the NRI plugin, containerd creates containers unadjusted.
func TestShimAdjustsWithoutTheNRIPlugin(t *testing.T) {
	const said = "not adjusted by the NRI plugin"
	inPod := func(s *specs.Spec) {
		s.Annotations["io.kubernetes.cri.container-type"], s.Annotations["io.kubernetes.cri.sandbox-id"] = "container", "p1"
	}
	for name, tc := range map[string]struct {
		change func(*specs.Spec)
		says   bool
	}{
		"a container of the CRI's":                        {inPod, true},
		"one with the marker, and another plugin's mount": {func(s *specs.Spec) { inPod(s); s.Annotations[annotations.NRIKey] = "dev" }, false},
		"another engine's":                                {nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			var logged logBuffer
			old := log.L.Logger.Out
			log.L.Logger.SetOutput(&logged)
			defer log.L.Logger.SetOutput(old)
			h := newHarness(t)
			spec := readSpec(t, h.create(tc.change))
			if !slices.ContainsFunc(spec.Mounts, func(m specs.Mount) bool { return m.Destination == api.ExchangeDestination }) || spec.Annotations[annotations.ExternalMountsKey] != "/data" {
				t.Errorf("not adjusted: %+v", spec)
			}
			if says := strings.Contains(logged.String(), said); says != tc.says {
				t.Errorf("logged: %t, want %t", says, tc.says)
			}
		})
	}
}

// logBuffer is for a log that several goroutines write.
type logBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
