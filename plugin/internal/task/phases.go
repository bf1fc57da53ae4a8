// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"time"

	"github.com/containerd/log"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
	"github.com/kata-checkpoint/kata-checkpoint/internal/stopat"
)

// phases records the steps of a checkpoint and the time that each has taken.
type phases struct {
	id   string
	last time.Time
	list []imageset.Phase

	stops stopat.Dir
}

func (p *phases) done(ctx context.Context, name string) {
	now := time.Now()
	p.add(ctx, name, now.Sub(p.last))
	p.stops.Wait(ctx, "checkpoint", name)
	p.last = time.Now()
}

// guest adds the agent's own phases, and the time between them.
func (p *phases) guest(ctx context.Context, list []*api.Phase) {
	rest := time.Since(p.last)
	for _, ph := range list {
		d := time.Duration(ph.GetNanoseconds()) //nolint:gosec // a guest that lies spoils a log line
		p.add(ctx, "guest: "+ph.GetName(), d)
		rest -= d
	}
	p.add(ctx, "guest: other", max(rest, 0))
	p.last = time.Now()
}

func (p *phases) add(ctx context.Context, name string, d time.Duration) {
	p.list = append(p.list, imageset.Phase{Name: name, Duration: d})
	log.G(ctx).WithFields(log.Fields{"container": p.id, "phase": name, "duration": d}).Info("checkpoint")
}
