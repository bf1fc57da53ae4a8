package guestagent

import (
	"context"
	"time"

	"github.com/containerd/log"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/api"
)

// phases measures the steps of an operation and logs each as it ends.
type phases struct {
	ctx  context.Context
	last time.Time
	list []*api.Phase
}

func newPhases(ctx context.Context, id string) *phases {
	return &phases{ctx: log.WithLogger(ctx, log.G(ctx).WithField("container", id)), last: time.Now()}
}

// done ends the current phase and begins the next.
func (p *phases) done(name string) {
	now := time.Now()
	d := now.Sub(p.last)
	p.last = now
	p.list = append(p.list, &api.Phase{Name: name, Nanoseconds: uint64(d)}) //nolint:gosec // not negative
	log.G(p.ctx).WithFields(log.Fields{"phase": name, "duration": d}).Info("phase done")
}
