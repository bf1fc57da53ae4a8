// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"time"

	"github.com/containerd/log"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/stopat"
)

// phases measures the steps of an operation and logs each when it is done.
type phases struct {
	ctx       context.Context
	operation string
	last      time.Time
	list      []*api.Phase
}

// stops has a file for each phase after which a test wants to stop an
// operation. Only root in the guest can write there.
var stops = stopat.In(api.StateDir + "/stop")

func newPhases(ctx context.Context, operation, id string) *phases {
	return &phases{ctx: log.WithLogger(ctx, log.G(ctx).WithField("container", id)), operation: operation, last: time.Now()}
}

// done ends the current phase and begins the next.
func (p *phases) done(name string) {
	now := time.Now()
	d := now.Sub(p.last)
	p.list = append(p.list, &api.Phase{Name: name, Nanoseconds: uint64(d)}) //nolint:gosec // not negative
	log.G(p.ctx).WithFields(log.Fields{"phase": name, "duration": d}).Info("phase done")
	stops.Wait(p.ctx, p.operation, name)
	p.last = time.Now()
}
