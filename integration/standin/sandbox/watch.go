// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"context"
	"time"

	"github.com/containerd/log"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/api"
)

// Kata's Go shim asks its agent every checkEvery whether it is well, and waits
// checkTimeout for the answer (src/runtime/virtcontainers/monitor.go and
// kata_agent.go).
const (
	checkEvery   = 5 * time.Second
	checkTimeout = 30 * time.Second
)

// watch ends a VM whose agent does not answer, as Kata's Go shim does. The Rust
// shim waits.
func (s *Sandbox) watch() {
	answers := func(ctx context.Context) {
		// Of no container: any answer will do.
		_, _ = s.Agent.Stats(ctx, &api.ContainerRequest{})
	}
	if watch(s.vm.Gone(), checkEvery, checkTimeout, answers) {
		log.L.WithField("sandbox", s.ID).Warn("the agent does not answer, and the VM ends")
		s.vm.End()
	}
}

// watch calls check, which returns when the agent has answered or the context is
// done, until that has taken longer than timeout, which it reports, or the VM has
// gone.
func watch(gone <-chan struct{}, every, timeout time.Duration, check func(context.Context)) bool {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-gone:
			return false
		case <-tick.C:
		}
		ctx, cancel := context.WithTimeout(context.Background(), timeout)
		check(ctx)
		late := ctx.Err() != nil
		cancel()
		if late {
			return true
		}
	}
}
