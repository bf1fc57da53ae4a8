// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
	"unicode"

	eventsapi "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/containerd/v2/core/runtime"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/budget"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
	"github.com/kata-checkpoint/kata-checkpoint/internal/metrics"
	"github.com/kata-checkpoint/kata-checkpoint/internal/remove"
	"github.com/kata-checkpoint/kata-checkpoint/internal/signing"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/bundle"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/guest"
)

// maxCRIULog bounds how much of CRIU's log and statistics is copied, in bytes:
// of a longer log, its end, which says what went wrong.
const maxCRIULog = 16 << 20

// checkpointRequest is a validated request for a checkpoint.
type checkpointRequest struct {
	path string
	// work is the directory for CRIU's log and statistics, or empty.
	work    string
	options *api.CheckpointOptions
	// stop: the container is killed once the image set is complete.
	stop bool
	// report is what will be known of it.
	report *metrics.Report
	// hasOptions: the engine has sent options.
	hasOptions bool
	// isStored: the image set goes to where containerd stores it, and not to a
	// directory that the options name.
	isStored bool
}

// checkpoint writes an image set of a container into the directory that the
// engine names. If it fails, the container keeps running, or remains paused.
func (c *container) checkpoint(ctx context.Context, r *task.CheckpointTaskRequest) (err error) {
	measured := c.s.metrics.Begin(metrics.Checkpoint)
	report := c.newReport(ctx)
	defer func() { measured.End(*report, err) }()
	req, err := c.checkpointRequest(r)
	if err != nil {
		return fmt.Errorf("checkpoint container %s: %w", r.ID, err)
	}
	req.report = report
	// A second checkpoint does not wait for the first.
	if st, busy := c.current().(checkpointingState); busy {
		return st.busy()
	}
	ctx, end := c.s.operation(ctx)
	defer end()
	if err := c.do(ctx, func(st state) error { return st.checkpoint(ctx, req) }); err != nil {
		if ctx.Err() != nil {
			// containerd has created it, but may not be there to remove it.
			err = errclass.Join(err, bundle.RemoveTemporary(req.path))
		}
		return err
	}
	c.publish(ctx, runtime.TaskCheckpointedEventTopic, &eventsapi.TaskCheckpointed{ContainerID: c.id, Checkpoint: r.Path})
	return nil
}

func (c *container) checkpointRequest(r *task.CheckpointTaskRequest) (*checkpointRequest, error) {
	opts, err := decodeOptions(r.Options)
	if err != nil {
		return nil, err
	}
	req := &checkpointRequest{path: r.Path, work: opts.GetWorkPath(), hasOptions: opts != nil, isStored: opts.GetImagePath() == ""}
	if req.path == "" {
		req.path = opts.GetImagePath()
	}
	if !filepath.IsAbs(req.path) || req.work != "" && !filepath.IsAbs(req.work) {
		return nil, errclass.Invalid(errcode.PathNotAbsolute, "image path %q and work path %q must be absolute", req.path, req.work)
	}
	if req.options, err = criuOptions(opts, c.annotations); err != nil {
		return nil, err
	}
	if req.stop, err = stopsAfterCheckpoint(opts, c.annotations, c.s.cfg); err != nil {
		return nil, errclass.Invalid(errcode.Annotation, "%w", err)
	}
	if req.work == "" && annotations.MadeByCRI(c.annotations) {
		req.work = bundle.CRIWorkPath(c.bundle)
	}
	return req, nil
}

// checkpointJob is a checkpoint in progress.
type checkpointJob struct {
	*checkpointRequest
	c      *container
	phases *phases
	// images is the image set's name in the exchange directory.
	images string
	// rounds are the names of the pre-dumps in the exchange directory, of which
	// parents are those that the dump is based on.
	rounds, parents []string
	// byEngine: an engine has paused the container for this checkpoint, and will
	// resume it.
	byEngine bool
	// processors is how many the guest has, or 0 if its agent does not say so.
	processors uint32
	// key signs the image set.
	key    *signing.Key
	target *imageset.Target
	// exchange is nil until the guest may write.
	exchange *openExchange
}

// runCheckpoint makes a checkpoint of a running or paused container. Afterwards
// the container is in the same state again, unless it is to be stopped.
func (c *container) runCheckpoint(ctx context.Context, before state, r *checkpointRequest) error {
	begin := time.Now()
	j := &checkpointJob{
		checkpointRequest: r, c: c, images: "checkpoint-" + strings.ToLower(rand.Text()),
		phases: &phases{id: c.id, last: begin, stops: c.s.stops},
	}
	if st, ok := before.(pausedState); ok {
		j.byEngine = st.by.isEngines()
	}
	c.transition(checkpointingState{c: c, isFrozen: before.frozen(), isPaused: before.paused()})
	c.freezes.checkpointed()
	m, err := j.run(ctx, before)
	err = adviseFull(err)
	// The container comes before the files, because the agent may still be writing
	// some.
	c.leaveCheckpoint(ctx, before, err)
	cleanErr := j.clean(err != nil)
	if j.target != nil {
		err = c.explainLostAgent(ctx, err)
	}
	c.resumeIfPending(ctx)
	logger := log.G(ctx).WithFields(log.Fields{"container": c.id, "duration": time.Since(begin), "path": r.path})
	r.report.Phases = reported(j.phases.list)
	if err != nil {
		err = fmt.Errorf("checkpoint container %s: %w", c.id, errclass.Join(err, cleanErr))
		logger.WithError(err).Error("failed to checkpoint container")
		return err
	}
	if cleanErr != nil {
		logger.WithError(cleanErr).Warn("failed to clean up after checkpoint")
	}
	r.report.Bytes = m.Bytes()
	logger.WithField("bytes", m.Bytes()).Info("checkpointed container")
	return nil
}

// run makes the checkpoint and leaves the container stopped, frozen, or, if
// nothing forbids it, running.
func (j *checkpointJob) run(ctx context.Context, before state) (*imageset.Manifest, error) {
	c := j.c
	if err := j.openTarget(); err != nil {
		return nil, errclass.With(errdefs.ErrFailedPrecondition, err)
	}
	if err := j.preflight(ctx, before); err != nil {
		return nil, err
	}
	if err := j.checkDeferred(before); err != nil {
		return nil, err
	}
	var err error
	if j.exchange, err = c.exchange.open(c.s.base, j.exchangeLimits(before)); err != nil {
		return nil, err
	}
	ctx, unbind := j.exchange.bind(ctx)
	defer unbind()
	j.phases.done(ctx, "prepare")
	endTurn, waited := c.s.dumps.begin(ctx, j.processors)
	defer endTurn()
	if waited {
		j.phases.done(ctx, "wait for other dumps")
	}
	if !before.frozen() {
		j.preDump(ctx, before)
		if err := c.execGate.close(ctx, c.s.cfg.ExecWaitTimeout); err != nil {
			return nil, err
		}
		c.transition(checkpointingState{c: c, isFrozen: true, isPaused: before.paused()})
		if err := c.freeze(ctx); err != nil {
			return nil, errclass.Join(err, j.undoFreeze(ctx, before))
		}
		j.phases.done(ctx, "freeze")
	}

	r := j.request()
	if r.Thaw = j.thawsEarly(ctx, before); r.Thaw {
		r.Turn = c.turn.Add(1)
	}
	images := imageset.Follow(c.exchange.dir, j.images, j.target.Dir(), c.s.limits(), imageset.DumpLogName, imageset.StatsName, api.FoldedName)
	defer images.Stop()
	var out *api.CheckpointResponse
	err = c.s.agent.CallDedicated(ctx, func(ctx context.Context, a api.AgentService) (err error) {
		out, err = a.Checkpoint(ctx, r)
		return err
	})
	endTurn()
	if err != nil {
		return nil, j.keepLog(ctx, err)
	}
	j.phases.guest(ctx, out.GetPhases())
	if r.GetThaw() {
		if err := j.noteThaw(ctx, out); err != nil {
			return nil, err
		}
		c.transition(checkpointingState{c: c, isPaused: before.paused()})
	}

	if err := j.compose(images); err != nil {
		return nil, err
	}
	files, err := images.Collect(ctx)
	if err != nil {
		return nil, j.explainFull(err)
	}
	j.copyLogs(ctx)
	j.phases.done(ctx, "copy images")
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	m, err := j.manifest(out, files)
	if err != nil {
		return nil, err
	}
	if err := j.target.Sync(ctx, files); err != nil {
		return nil, j.explainFull(err)
	}
	j.phases.done(ctx, "sync")
	m.Phases = j.phases.list
	if err := j.target.Commit(ctx, m, j.key); err != nil {
		return nil, j.explainFull(err)
	}
	j.phases.done(ctx, "commit")
	if j.stop {
		// A caller that has given up may not keep the image set, as containerd, which
		// removes its own copy. Then the container is all that is left.
		if ctx.Err() != nil {
			return nil, errcode.NotStopped.Errorf("the image set in %s is complete, but the container was not stopped: %w", j.path, context.Cause(ctx))
		}
		uctx, cancel := cleanupContext(ctx)
		defer cancel()
		// From its end on nobody has them.
		c.s.holdConnections(ctx, c.netgateKey(), m.Connections)
		if err := c.killAndWait(uctx); err != nil {
			c.s.releaseConnections(ctx, c.netgateKey())
			return nil, errcode.NotStopped.Errorf("the image set in %s is complete, but the container could not be stopped: %w", j.path, err)
		}
		j.phases.done(ctx, "stop")
	}
	return m, nil
}

// noteThaw notes that the agent has thawed the container, as it was asked to. One
// of an earlier release has not: that is done here.
func (j *checkpointJob) noteThaw(ctx context.Context, out *api.CheckpointResponse) error {
	if out.GetThawed() {
		j.c.freezes.end(j.c)
		return nil
	}
	if err := j.c.thaw(ctx); err != nil {
		return err
	}
	j.phases.done(ctx, "thaw")
	return nil
}

// request is the request to the agent.
func (j *checkpointJob) request() *api.CheckpointRequest {
	return &api.CheckpointRequest{ContainerId: j.c.id, Directory: j.images, Options: j.options, Externals: j.c.externals, Stop: j.stop, Token: j.c.exchange.token, Rights: j.c.bounds, Parents: j.parents}
}

// openTarget opens the directory for the image set, and records what `delete`
// has to remove if this process is killed.
func (j *checkpointJob) openTarget() (err error) {
	if j.key, err = j.c.s.nodeKey.load(j.c.s.cfg.SigningKey); err != nil {
		return err
	}
	if j.target, err = imageset.NewTarget(j.path); err != nil {
		return j.explainFull(err)
	}
	staging := j.target.Dir().Name()
	return bundle.SetUnfinished(j.c.s.cfg.StateDir, j.c.s.namespace, j.c.id, staging)
}

// explainFull adds to the error of a full file system what to do about it.
func (j *checkpointJob) explainFull(err error) error {
	if full := new(budget.FullError); errors.As(err, &full) {
		return errclass.With(errdefs.ErrResourceExhausted, errcode.NoSpace.Errorf("no space left for the image set in %s: %w, or use a directory on another file system", j.path, err))
	}
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return errclass.With(errdefs.ErrResourceExhausted, errcode.NoSpace.Errorf("no space left for the image set in %s: free some, or use a directory on another file system: %w", j.path, err))
	}
	return err
}

// clean removes everything but the finished image set.
func (j *checkpointJob) clean(failed bool) (err error) {
	switch {
	case failed || j.stop:
		for _, dir := range j.directories() {
			err = errclass.Join(err, remove.All(j.c.exchange.path(dir)))
		}
		if j.exchange != nil {
			j.exchange.close()
		}
	default:
		go j.c.discardImages(j.directories(), j.exchange)
	}
	if j.target == nil {
		return err
	}
	if aerr := j.target.Abort(); aerr != nil {
		return errclass.Join(err, aerr)
	}
	return errclass.Join(err, bundle.SetUnfinished(j.c.s.cfg.StateDir, j.c.s.namespace, j.c.id, ""))
}

// leaveCheckpoint returns a container to its state before the checkpoint.
func (c *container) leaveCheckpoint(ctx context.Context, before state, failed error) {
	if hasStopped(c.current()) {
		return
	}
	if c.s.down.ended() {
		c.stopped() // `delete` ends the VM
		return
	}
	// A caller that is gone or whose deadline has passed resumes nothing any
	// longer, so that a container that it has paused is thawed here.
	abandoned := failed != nil && ctx.Err() != nil
	uctx, cancel := cleanupContext(ctx)
	defer cancel()
	if before.paused() && !abandoned {
		next := c.pausedAgain(uctx, before, failed != nil)
		c.transition(next)
		if st, ok := next.(pausedState); ok && st.deferred {
			c.freezeLater(st.by)
		}
		return
	}
	if c.isFrozen() {
		if err := c.thaw(uctx); err != nil {
			log.G(ctx).WithError(err).WithField("container", c.id).Error("failed to thaw container after checkpoint")
			c.transition(pausedState{c: c, thawOwed: true})
			c.collectThaw()
			return
		}
	}
	c.transition(runningState{c: c})
	c.freezes.end(c)
	if before.paused() {
		c.publish(ctx, runtime.TaskResumedEventTopic, &eventsapi.TaskResumed{ContainerID: c.id})
		log.G(ctx).WithField("container", c.id).Warn("resumed container that its caller paused for an abandoned checkpoint")
	}
}

// explainLostAgent adds what to do to the error of a checkpoint that failed
// because the agent died.
func (c *container) explainLostAgent(ctx context.Context, err error) error {
	if hasStopped(c.current()) || !guest.IsGone(err) {
		return err
	}
	uctx, cancel := cleanupContext(ctx)
	defer cancel()
	switch aerr := c.s.ensureAgent(uctx); {
	case aerr != nil && c.s.vmEnded():
		return fmt.Errorf("%w: %w", err, guest.ErrNoVM)
	case aerr != nil:
		return fmt.Errorf("%w; it could not be restarted: unless the VM has ended, its containers keep running, but cannot be checkpointed again in this VM", err)
	}
	return fmt.Errorf("%w; it has been restarted: repeat the checkpoint", err)
}

// preflight finds what would make a checkpoint fail, before anything is frozen.
func (j *checkpointJob) preflight(ctx context.Context, before state) error {
	c := j.c
	var info *api.InfoResponse
	err := c.s.callAgent(ctx, func(ctx context.Context, a api.AgentService) (err error) {
		info, err = a.Info(ctx, &api.InfoRequest{Check: true})
		return err
	})
	if err != nil {
		return err
	}
	j.processors = info.GetProcessors()
	if p := info.GetProblems(); len(p) > 0 {
		return errclass.With(errdefs.ErrFailedPrecondition, errcode.Parse(strings.Join(p, "; ")))
	}
	if before.frozen() {
		return nil // the agent checks again at Checkpoint
	}
	return c.s.callAgent(ctx, func(ctx context.Context, a api.AgentService) error {
		_, err := a.CheckCheckpoint(ctx, j.request())
		return err
	})
}

func (j *checkpointJob) manifest(out *api.CheckpointResponse, files []imageset.File) (*imageset.Manifest, error) {
	c, o := j.c, j.options
	m := &imageset.Manifest{
		Created: time.Now().UTC(),
		Container: imageset.Container{
			ID: c.id, Namespace: c.s.namespace, PodNamespace: annotations.PodNamespace(c.annotations), Image: annotations.ImageName(c.annotations), Args: c.args,
			Hostname: hostName(out.GetHostname()),
		},
		Rights:   c.rights,
		Guest:    imageset.Guest{Kernel: out.GetKernelRelease(), CRIUVersion: out.GetCriuVersion(), CPUFeatures: out.GetCpuFeatures()},
		Terminal: c.terminal,
		Options: imageset.Options{
			TCPEstablished: o.GetTcpEstablished() || out.GetTcpEstablished(), TCPClose: o.GetTcpClose(), ExternalUnixSockets: o.GetExternalUnixSockets(),
			Terminal: o.GetTerminal(), FileLocks: o.GetFileLocks(), EmptyNamespaces: o.GetEmptyNamespaces(),
		},
		Phases: j.phases.list,
		Files:  files,
	}
	for _, e := range out.GetExternals() {
		m.Externals = append(m.Externals, imageset.External{Name: e.GetName(), Destination: e.GetDestination(), FSType: e.GetFstype(), Device: e.GetDevice()})
		if slices.Contains(c.externals, e.GetDestination()) {
			m.Container.Mounts = append(m.Container.Mounts, e.GetDestination())
		}
	}
	for _, s := range out.GetStdio() {
		m.Stdio = append(m.Stdio, imageset.Stdio{FD: s.GetFd(), Key: s.GetKey()})
	}
	for _, f := range out.GetOpenFiles() {
		m.OpenFiles = append(m.OpenFiles, imageset.NewOpenFile(f.GetPath(), f.GetSize(), f.GetMayGrow()))
	}
	for _, t := range out.GetConnections() {
		local, lerr := netip.ParseAddrPort(t.GetLocal())
		remote, rerr := netip.ParseAddrPort(t.GetRemote())
		if err := errclass.Join(lerr, rerr); err != nil {
			return nil, errcode.AgentViolation.Errorf("the agent returned an invalid TCP connection: %w", err)
		}
		m.Connections = append(m.Connections, imageset.Connection{Local: local, Remote: remote})
	}
	for _, a := range out.GetAddresses() {
		address, err := imageset.ParseAddress(a.GetInterface(), a.GetAddress())
		if err != nil {
			return nil, errcode.AgentViolation.Errorf("the agent returned an invalid address: %w", err)
		}
		m.Addresses = append(m.Addresses, address)
	}
	m.Sockets = imageset.NewSockets(out.GetSockets())
	for _, a := range out.GetAttributes() {
		m.Attributes = append(m.Attributes, imageset.Attribute{PID: a.GetPid(), Thread: a.GetThread(), Name: a.GetName(), Value: a.GetValue()})
	}
	return m, nil
}

// hostName is what a manifest has of a host name, which the container chooses.
// It only informs a reader.
func hostName(name string) string {
	const longest = 64 // __NEW_UTS_LEN
	name = strings.ToValidUTF8(name[:min(len(name), longest)], "?")
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return '?'
		}
		return r
	}, name)
}

// keepLog keeps CRIU's log of a dump that failed, if there is one, and adds its
// path to the error. Without a work path it is in the container's bundle, until
// the container is removed.
func (j *checkpointJob) keepLog(ctx context.Context, err error) error {
	if j.work == "" {
		j.work = filepath.Join(j.c.bundle, bundle.LogDir)
	}
	if !j.copyLogs(ctx) {
		return err
	}
	return fmt.Errorf("%w; CRIU's log is in %s", err, filepath.Join(j.work, imageset.DumpLogName))
}

// copyLogs copies CRIU's log and statistics to the work path, and reports whether
// the log is there. No checkpoint fails because of them.
func (j *checkpointJob) copyLogs(ctx context.Context) (copied bool) {
	if j.work == "" {
		return false
	}
	for _, name := range []string{imageset.DumpLogName, imageset.StatsName} {
		data, err := imageset.ReadFile(j.c.exchange.dir, j.images, name, maxCRIULog)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err == nil {
			err = imageset.WriteLog(j.work, name, data)
		}
		if err != nil {
			log.G(ctx).WithError(err).WithField("file", name).Warn("failed to copy file to work path")
			continue
		}
		copied = copied || name == imageset.DumpLogName
	}
	return copied
}
