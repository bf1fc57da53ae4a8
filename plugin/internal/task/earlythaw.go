// SPDX-License-Identifier: Apache-2.0

package task

import (
	"cmp"
	"context"
	"sync/atomic"
	"time"

	"github.com/containerd/log"

	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
)

// bracketTime is how soon an engine that pauses a container for a checkpoint
// requests it.
const bracketTime = time.Second

// pause is a Pause. Engines pause a container right before they request a
// checkpoint, and resume it when they have read what they want to; containerd's
// client asks for its state before the Pause, and not between the two
// (client/task.go, Checkpoint). Whoever finds a paused container asks first, and
// never resumes it.
type pause struct {
	at time.Time
	// seen: somebody has been told that the container is paused.
	seen atomic.Bool
}

// isEngines reports whether the Pause is an engine's, for the checkpoint that is
// requested now, so that its Resume will follow.
func (p *pause) isEngines() bool {
	return p != nil && !p.seen.Load() && time.Since(p.at) < bracketTime
}

// noteLook notes that State is being answered.
func (c *container) noteLook() {
	if st, ok := c.current().(pausedState); ok && st.by != nil {
		st.by.seen.Store(true)
	}
}

// thawsEarly reports whether the container runs again as soon as it is dumped,
// while its images are copied and the engine reads what it wants to. That is so
// if nobody has paused it. After an engine's Pause it is so if the engine reads
// nothing that the container could change meanwhile.
func (j *checkpointJob) thawsEarly(ctx context.Context, before state) bool {
	c := j.c
	st, isPaused := before.(pausedState)
	switch {
	case j.stop:
		return false
	case !isPaused, st.runs && !st.deferred:
		return true
	case !j.byEngine, c.s.holdsOthers(c):
		return false
	}
	if !annotations.MadeByCRI(c.annotations) {
		return cmp.Or(c.thawAt, c.s.cfg.Thaw) == annotations.AfterDump
	}
	if c.thawAt == annotations.AfterDump && !c.rootIsFixed {
		log.G(ctx).WithField("container", c.id).Warn("container remains frozen until its engine resumes it, in spite of its annotation " + annotations.ThawKey + ": the CRI reads its root file system, to which it can write")
	}
	// Without options it is the CRI that asks, which reads the root file system and
	// nothing else.
	return c.rootIsFixed && !j.hasOptions && c.thawAt != annotations.AtResume
}

// holdsOthers reports whether another container of the sandbox is paused.
// Whoever has paused several wants them to be of the same instant.
func (s *Service) holdsOthers(c *container) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, other := range s.containers {
		if other != c && other.current().paused() {
			return true
		}
	}
	return false
}

// pausedAgain is the state of a container that was paused before a checkpoint,
// after it. One whose processes ran before it is thawed if it is still frozen,
// unless its Pause was deferred.
func (c *container) pausedAgain(ctx context.Context, before state, failed bool) state {
	st, ok := before.(pausedState)
	if !ok {
		return before
	}
	if st.runs && !st.deferred && c.isFrozen() {
		if err := c.thaw(ctx); err != nil {
			// Its Resume tries again.
			log.G(ctx).WithError(err).WithField("container", c.id).Error("failed to thaw container after checkpoint")
			st.runs = false
		}
	} else {
		st.runs = !c.isFrozen()
	}
	st.deferred = st.deferred && st.runs && failed
	if st.by != nil {
		st.by.seen.Store(true) // its checkpoint has been made
	}
	return st
}
