// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"fmt"
	"math"
	"slices"
	"strconv"
	"time"

	eventsapi "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/v2/core/runtime"
	"github.com/containerd/log"
	"google.golang.org/protobuf/proto"

	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/budget"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
)

// A pre-dump copies memory while the container runs, so that the dump, for which
// the container is frozen, has little left to copy. It has to come between the
// engine's Pause and its request for the checkpoint. Where the user wants
// pre-dumps, a Pause is therefore deferred: it is answered, State reports the
// container as paused, and it runs until the checkpoint freezes it.

// choosePreDumps reads how often the container's memory is copied.
func (c *container) choosePreDumps() error {
	rounds, ok, err := annotations.PreDump(c.annotations)
	switch {
	case err != nil:
		return err
	case ok:
		c.preDumps = rounds
	case annotations.MadeByCRI(c.annotations):
		c.preDumps = c.s.cfg.PreDumpsCRI
	default:
		c.preDumps = c.s.cfg.PreDumps
	}
	return nil
}

// defersPause reports whether a Pause is deferred: not while another container of
// the sandbox is held.
func (c *container) defersPause(ctx context.Context, canPreDump bool) bool {
	if c.preDumps == 0 || c.s.holdsOthers(c) {
		return false
	}
	if !canPreDump {
		c.s.noPreDump.Do(func() {
			log.G(ctx).WithField("container", c.id).Warn("containers of this sandbox are checkpointed without pre-dumps: the guest's kernel lacks CONFIG_MEM_SOFT_DIRTY, or its agent is older than this shim")
		})
		return false
	}
	return true
}

// deferPause answers a Pause whose freeze is left to a checkpoint, or comes when
// none was requested in time.
func (c *container) deferPause(ctx context.Context, begin time.Time) {
	by := &pause{at: time.Now()}
	c.transition(pausedState{c: c, by: by, runs: true, deferred: true})
	c.publish(ctx, runtime.TaskPausedEventTopic, &eventsapi.TaskPaused{ContainerID: c.id})
	log.G(ctx).WithField("container", c.id).WithField("duration", time.Since(begin)).Info("deferred pause of container until its memory is copied")
	c.freezeLater(by)
}

// freezeLater freezes a container whose Pause was deferred, unless it is
// checkpointed or resumed before.
func (c *container) freezeLater(by *pause) {
	c.s.background(func(ctx context.Context) {
		for wait := bracketTime; ; wait = lastThawPause {
			timer := time.NewTimer(wait)
			select {
			case <-timer.C:
			case <-ctx.Done():
				timer.Stop()
				return
			}
			if _, busy := c.current().(checkpointingState); busy {
				return // if that fails, this is called again
			}
			err := c.do(ctx, func(state) error { return c.freezeIfDeferred(ctx, by) })
			if err == nil {
				return
			}
			log.G(ctx).WithError(err).WithField("container", c.id).Error("failed to freeze a container that is reported as paused, trying again")
		}
	})
}

// freezeIfDeferred freezes a container whose Pause was deferred. The caller holds
// the slot.
func (c *container) freezeIfDeferred(ctx context.Context, by *pause) error {
	st, ok := c.current().(pausedState)
	if !ok || !st.deferred || by != nil && st.by != by {
		return nil
	}
	if err := c.execGate.close(ctx, c.s.cfg.ExecWaitTimeout); err != nil {
		return err
	}
	if err := c.freeze(ctx); err != nil {
		c.execGate.open()
		return err
	}
	st.runs, st.deferred = false, false
	c.transition(st)
	log.G(ctx).WithField("container", c.id).Info("froze container whose pause was deferred")
	return nil
}

// freezeDeferred freezes the other containers of the sandbox whose Pause was
// deferred: whoever pauses several wants them to be of one instant. It waits for
// no checkpoint, which sees to that on its own.
func (s *Service) freezeDeferred(ctx context.Context, c *container) {
	s.mu.RLock()
	var deferred []*container
	for _, other := range s.containers {
		if st, ok := other.current().(pausedState); ok && st.deferred && other != c {
			deferred = append(deferred, other)
		}
	}
	s.mu.RUnlock()
	for _, other := range deferred {
		select {
		case other.slot <- struct{}{}:
		default:
			continue
		}
		err := other.freezeIfDeferred(ctx, nil)
		<-other.slot
		other.resumeIfIdle(ctx)
		if err != nil {
			log.G(ctx).WithError(err).WithField("container", other.id).Warn("failed to freeze container whose pause was deferred")
		}
	}
}

// undoFreeze has a container whose Pause was deferred run again where the freeze
// for its checkpoint has failed and may have stopped some of its processes. It is
// frozen later, as after any failure before the freeze.
func (j *checkpointJob) undoFreeze(ctx context.Context, before state) error {
	if !before.paused() {
		return nil // [container.leaveCheckpoint] thaws it
	}
	uctx, cancel := cleanupContext(ctx)
	defer cancel()
	if err := j.c.thaw(uctx); err != nil {
		return err
	}
	j.c.transition(checkpointingState{c: j.c, isPaused: true})
	return nil
}

// checkDeferred refuses a checkpoint of a container whose Pause was deferred if the
// engine may have read its writable layer since: `ctr containers checkpoint` does
// so before it requests the checkpoint, unlike all others.
func (j *checkpointJob) checkDeferred(before state) error {
	if st, ok := before.(pausedState); !ok || !st.deferred || !j.hasOptions || !j.isStored {
		return nil
	}
	return errclass.Precondition(errcode.PreDumpStored, "a container with pre-dumps cannot be checkpointed with options and without an image path, because what the engine has read of its files before may be of another instant: "+
		"use `ctr task checkpoint --image-path`, or create the container with the annotation "+annotations.PreDumpKey+": "+annotations.PreDumpOff)
}

// exchangeLimits bound what the guest may write: with pre-dumps, those as well.
func (j *checkpointJob) exchangeLimits(before state) budget.Limits {
	limits := j.c.s.limits()
	if st, ok := before.(pausedState); ok && st.deferred {
		limits.Files *= j.c.preDumps + 1
		limits.Bytes = max(limits.Bytes, limits.Bytes+min(limits.Bytes, math.MaxInt64-limits.Bytes))
	}
	return limits
}

// directories are the names of what the checkpoint has in the exchange directory.
func (j *checkpointJob) directories() []string { return slices.Concat(j.rounds, []string{j.images}) }

const (
	// preDumpPhase and its number is the name of a round's phase.
	preDumpPhase = "pre-dump "
	// preDumpBudget is how long the rounds take together at most.
	preDumpBudget = time.Minute
	// smallRound is a number of bytes that the dump copies as fast as a round.
	smallRound = 1 << 20
)

// quarter returns at most a quarter of the time that the caller allows.
func quarter(ctx context.Context, most time.Duration) time.Duration {
	if deadline, ok := ctx.Deadline(); ok {
		return min(most, time.Until(deadline)/4)
	}
	return most
}

// preDump copies the memory of a container whose Pause was deferred while it runs.
// A round that fails is no failure of the checkpoint. Nothing is based on it then:
// it may have made the kernel forget what was written before.
func (j *checkpointJob) preDump(ctx context.Context, before state) {
	c := j.c
	if st, ok := before.(pausedState); !ok || !st.deferred {
		return
	}
	limit := quarter(ctx, preDumpBudget)
	var sizes []uint64
	for begin := time.Now(); len(sizes) < c.preDumps && time.Since(begin) < limit && goesOn(sizes) && !c.s.holdsOthers(c); {
		r := &api.PreDumpRequest{ContainerId: c.id, Directory: fmt.Sprintf("%s-%d", j.images, len(sizes)+1), Token: c.exchange.token}
		if n := len(j.rounds); n > 0 {
			r.Parent = j.rounds[n-1]
		}
		j.rounds = append(j.rounds, r.GetDirectory())
		var out *api.PreDumpResponse
		err := c.s.agent.CallDedicated(ctx, func(ctx context.Context, a api.AgentService) (err error) {
			out, err = a.PreDump(ctx, r)
			return err
		})
		if err != nil {
			log.G(ctx).WithError(err).WithField("container", c.id).Warn("failed to copy the memory of a running container, dumping all of it")
			j.parents = nil
			return
		}
		j.parents = slices.Clone(j.rounds)
		sizes = append(sizes, out.GetBytes())
		j.phases.done(ctx, preDumpPhase+strconv.Itoa(len(sizes)))
		log.G(ctx).WithFields(log.Fields{"container": c.id, "round": len(sizes), "bytes": out.GetBytes()}).Info("copied memory of running container")
	}
}

// goesOn reports whether another round gains anything, by the bytes that the
// rounds so far have copied.
func goesOn(sizes []uint64) bool {
	n := len(sizes)
	if n == 0 {
		return true
	}
	var sum uint64
	for _, s := range sizes {
		sum += s
	}
	last := sizes[n-1]
	small := last <= smallRound || last <= sizes[0]/64
	shrinks := n < 2 || last < sizes[n-2]/10*7
	return !small && shrinks && sum < 3*sizes[0]
}

// maxFolded bounds the list of where the content of folded pages is, in bytes. A
// part of it takes seven or so: it is enough for four million parts.
const maxFolded = 32 << 20

// compose has the images put together that are based on pre-dumps.
func (j *checkpointJob) compose(images *imageset.Follower) error {
	if len(j.parents) == 0 {
		return nil
	}
	data, err := imageset.ReadFile(j.c.exchange.dir, j.images, api.FoldedName, maxFolded+1)
	if err != nil {
		return fmt.Errorf("read where the guest has copied memory to: %w", err)
	}
	if len(data) > maxFolded {
		return errcode.PreDumpTooLarge.Errorf("the memory that pre-dumps have copied is in too many parts: create the container with the annotation %s: %s", annotations.PreDumpKey, annotations.PreDumpOff)
	}
	folded := &api.FoldedFiles{}
	if err := proto.Unmarshal(data, folded); err != nil {
		return errcode.GuestWroteWrong.Errorf("the guest has described wrongly where it has copied memory to: %w", err)
	}
	for _, f := range folded.GetFiles() {
		c, err := j.composition(f)
		if err != nil {
			return err
		}
		images.Compose(f.GetName(), c)
	}
	return nil
}

// composition is that of a file. Its sources are in directories of this
// checkpoint.
func (j *checkpointJob) composition(f *api.FoldedFile) (out imageset.Composition, err error) {
	wrong := errcode.GuestWroteWrong.Errorf("the guest has described %q, which pre-dumps have copied, wrongly", f.GetName())
	parts := len(f.GetPartSources())
	if !imageset.IsImage(f.GetName()) || len(f.GetSourceNames()) != len(f.GetSourceDirectories()) || len(f.GetPartOffsets()) != parts || len(f.GetPartSizes()) != parts {
		return out, wrong
	}
	directories := slices.Concat(j.parents, []string{j.images})
	for i, name := range f.GetSourceNames() {
		n := f.GetSourceDirectories()[i]
		if int64(n) >= int64(len(directories)) {
			return out, wrong
		}
		out.Sources = append(out.Sources, imageset.Source{Directory: directories[n], Name: name})
	}
	out.Parts = make([]imageset.Part, 0, parts)
	for i, source := range f.GetPartSources() {
		offset, size := f.GetPartOffsets()[i], f.GetPartSizes()[i]
		if offset > math.MaxInt64 || size > math.MaxInt64 {
			return out, wrong
		}
		out.Parts = append(out.Parts, imageset.Part{Source: int(source), Offset: int64(offset), Size: int64(size)})
	}
	return out, nil
}
