// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/moby/sys/capability"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
	"github.com/kata-checkpoint/kata-checkpoint/internal/metrics"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/bundle"
)

// source is the image set that a container is restored from.
type source struct {
	manifest *imageset.Manifest
	// path is the path of the image set, or of the archive that contained it.
	path string
	// rights bound the credentials of the restored processes.
	rights *api.Rights
	// staged is how long it took to stage it.
	staged time.Duration
	// once, if not nil, is the record that it is restored, which happens once.
	once *onceRecord
}

// prepareRestore stages the image set and replaces the container's process by
// the placeholder. Nothing has reached Kata yet, so that a refusal leaves
// nothing to clean up. A large set is verified while Kata creates the container,
// and damage in it is found by Start.
func (c *container) prepareRestore(ctx context.Context, r *task.CreateTaskRequest, spec *bundle.Spec) error {
	begin, path := time.Now(), r.Checkpoint
	removeTemporary := func() { c.s.removeTemporary(context.WithoutCancel(ctx), r.ID, r.Bundle, path) }
	ctx, end := c.s.operation(ctx)
	defer end()
	source, err := c.stageImages(ctx, path, false, r.Rootfs, spec, removeTemporary)
	if err != nil {
		removeTemporary()
		return errclass.With(errdefs.ErrFailedPrecondition, fmt.Errorf("restore from %s: %w", path, err))
	}
	c.source = source
	r.Checkpoint = "" // to Kata it is an ordinary container
	if c.exchange.staged() == nil {
		removeTemporary()
		c.source.staged = time.Since(begin)
		c.logStaged(ctx, c.source, c.source.staged)
	}
	return c.setPlaceholder(spec)
}

// noteTemporary notes containerd's copy of a checkpoint, which containerd never
// removes, whether the restore succeeds or not. If this process is killed, `delete`
// does. The caller calls the function at the end of Create with its error.
func (s *Service) noteTemporary(ctx context.Context, r *task.CreateTaskRequest) (end func(error), err error) {
	path := r.Checkpoint
	if path == "" {
		return func(error) {}, nil
	}
	end = func(err error) {
		if err != nil {
			s.removeTemporary(ctx, r.ID, r.Bundle, path)
		}
	}
	if err := bundle.SetTemporary(r.Bundle, path); err != nil {
		end(err)
		return nil, fmt.Errorf("restore: %w", err)
	}
	return end, nil
}

func (s *Service) removeTemporary(ctx context.Context, id, dir, path string) {
	if err := errclass.Join(bundle.RemoveTemporary(path), bundle.SetTemporary(dir, "")); err != nil {
		log.G(ctx).WithError(err).WithField("container", id).Warn("failed to remove containerd's temporary copy of the checkpoint")
	}
}

// stageImages verifies the image set in the directory path, copies it into the
// exchange directory, and applies the root file system diff beside it. If the
// directory is the container's own, in the exchange directory, it moves it. It
// calls copied, if not nil, when nobody reads the directory any more: that may be
// later, unless it returns an error.
func (c *container) stageImages(ctx context.Context, path string, own bool, rootfs []*types.Mount, spec *bundle.Spec, copied func()) (_ *source, err error) {
	set, err := imageset.Open(path)
	if err != nil {
		return nil, err
	}
	behind := false
	defer func() {
		if !behind {
			set.Close()
		}
	}()
	signed, err := c.permit(ctx, set)
	if err != nil {
		return nil, err
	}
	if err := checkFit(set.Manifest, spec.Spec, annotations.ImageName(c.annotations), c.terminal); err != nil {
		return nil, err
	}
	out := &source{manifest: set.Manifest, path: path, rights: rightsOf(spec.Process)}
	out.rights.Execs = signed
	switch {
	case own:
		err = set.MoveTo(ctx, c.exchange.path(restoreDir))
	case copied != nil && set.Manifest.Bytes() >= c.s.overlapFrom && !hasRootfsDiff(path):
		// A root file system diff is applied to verified sets only.
		if err = c.stageBehind(ctx, out, set, copied); err == nil {
			behind = true
		}
		return out, err
	default:
		err = set.CopyTo(ctx, c.exchange.path(restoreDir), c.s.limits())
	}
	if err != nil {
		return nil, err
	}
	if err := applyRootfsDiff(ctx, path, rootfs, c.s.limits()); err != nil {
		return nil, err
	}
	return out, nil
}

// logStaged logs that an image set is staged, which took a while.
func (c *container) logStaged(ctx context.Context, s *source, took time.Duration) {
	log.G(ctx).WithFields(log.Fields{
		"container": c.id, "phase": "stage images", "duration": took, "bytes": s.manifest.Bytes(), "from": s.path,
	}).Info("restore")
	c.s.stops.Wait(ctx, "restore", "stage images")
}

// checkFit returns all differences between the checkpointed container and the
// one that it is to be restored into by which the restore would fail, or
// restore something else.
func checkFit(m *imageset.Manifest, spec *specs.Spec, image string, terminal bool) error {
	var errs []string
	if spec.Process != nil && !slices.Equal(m.Container.Args, spec.Process.Args) {
		errs = append(errs, fmt.Sprintf("it was made of a container that runs %s and this one runs %s", quoteArgs(m.Container.Args), quoteArgs(spec.Process.Args)))
	}
	if otherImage(m.Container.Image, image) {
		errs = append(errs, fmt.Sprintf("its image was %s and this container's is %s", m.Container.Image, image))
	}
	if m.Terminal != terminal {
		errs = append(errs, map[bool]string{
			true:  "it was made of a container with a terminal and this one has none",
			false: "it was made of a container without a terminal and this one has one",
		}[m.Terminal])
	}
	var lost []string
	for _, d := range m.Container.Mounts {
		if !slices.ContainsFunc(spec.Mounts, func(have specs.Mount) bool { return filepath.Clean(have.Destination) == d }) {
			lost = append(lost, d)
		}
	}
	if len(lost) > 0 {
		errs = append(errs, "this container lacks the mounts at "+strings.Join(lost, ", "))
	}
	if m.Rights != nil {
		errs = append(errs, exceeding(m.Rights, rightsIn(spec))...)
	}
	if len(errs) > 0 {
		return errcode.DoesNotFit.Errorf("the checkpoint does not fit this container: %s", strings.Join(errs, "; "))
	}
	return nil
}

// otherImage reports whether two images are known to be different. The CRI
// names an image as the pod does or, when it restores a container itself, by
// its ID; a name and an ID cannot be compared.
func otherImage(a, b string) bool {
	const id = "sha256:"
	return a != "" && b != "" && strings.HasPrefix(a, id) == strings.HasPrefix(b, id) && a != b
}

// rightsOf returns the bounds that a spec sets for credentials. What a container
// has whose spec does not mention capabilities depends on Kata's shim; the agent
// also compares with what the placeholder has.
func rightsOf(p *specs.Process) *api.Rights {
	if p == nil {
		return &api.Rights{}
	}
	r := &api.Rights{NoNewPrivs: p.NoNewPrivileges, Uid: p.User.UID, Gid: p.User.GID, Groups: p.User.AdditionalGids}
	for _, l := range p.Rlimits {
		if r.Limits == nil {
			r.Limits = make(map[string]uint64)
		}
		r.Limits[strings.ToUpper(l.Type)] = l.Hard
	}
	if c := p.Capabilities; c != nil {
		r.Capabilities, r.Permitted, r.Inheritable, r.Ambient = c.Bounding, c.Permitted, c.Inheritable, c.Ambient
		return r
	}
	for _, c := range capability.ListKnown() {
		r.Capabilities = append(r.Capabilities, "CAP_"+strings.ToUpper(c.String()))
	}
	r.Permitted = r.Capabilities
	return r
}

// setPlaceholder replaces the container's init by the placeholder, below which
// the agent restores the processes.
func (c *container) setPlaceholder(spec *bundle.Spec) error {
	binary := c.s.cfg.Agent()
	if st, err := os.Stat(binary); err != nil || !st.Mode().IsRegular() {
		return errclass.Precondition(errcode.NoGuestBundle, "restore: %s does not exist: install the guest bundle on this node and set guest_bundle in config.toml to its directory", binary)
	}
	if err := spec.AddMount(specs.Mount{Destination: api.HelperPath, Type: "bind", Source: binary, Options: []string{"rbind", "rprivate", "ro"}}); err != nil {
		return err
	}
	fields := map[string]any{
		"args": []string{api.HelperPath, api.PlaceholderMode},
		"cwd":  "/",
		"user": specs.User{},
	}
	if spec.Process != nil && spec.Process.Capabilities != nil {
		// The placeholder forwards signals to processes of other users.
		caps := *spec.Process.Capabilities
		for _, set := range []*[]string{&caps.Bounding, &caps.Effective, &caps.Permitted} {
			if !slices.Contains(*set, "CAP_KILL") {
				*set = append(slices.Clone(*set), "CAP_KILL")
			}
		}
		fields["capabilities"] = caps
	}
	if err := spec.SetProcess(fields); err != nil {
		return err
	}
	// The placeholder reaps the restored processes, which it could not do in a
	// shared PID namespace.
	return spec.OwnPIDNamespace()
}

// startRestored starts the placeholder and restores the image set below it. If
// that fails, no process is left.
func (c *container) startRestored(ctx context.Context, r *task.StartRequest) (_ *task.StartResponse, err error) {
	begin := time.Now()
	measured := c.s.metrics.Begin(metrics.Restore)
	report := c.newReport(ctx)
	var waited time.Duration // for the image set, which is counted once
	defer func() {
		report.Phases = slices.Insert(report.Phases, 0, metrics.Phase{Name: metrics.StageImages, Seconds: c.source.staged.Seconds()})
		report.Seconds = (c.source.staged + measured.Elapsed() - waited).Seconds()
		measured.End(*report, err)
	}()
	ctx, end := c.interruptible(ctx)
	defer end()
	c.s.stops.Wait(ctx, "restore", "adopt")
	req := restoreRequest(c)
	waited, err = c.awaitImages(ctx)
	if err == nil {
		err = c.s.agent.CallIdempotent(ctx, func(ctx context.Context, a api.AgentService) error {
			_, err := a.CheckRestore(ctx, req)
			return err
		})
	}
	if err != nil {
		err = adviseFull(err)
		c.stopPlaceholder(ctx, r)
		return nil, fmt.Errorf("restore container %s from %s: %w", c.id, c.source.path, err)
	}
	resp, err := c.startInKata(ctx, r)
	if err != nil {
		return nil, errclass.Join(err, c.endFailedStart(ctx))
	}
	c.s.stops.Wait(ctx, "restore", "start")
	// From the Start on there is a placeholder, which is ended if the caller has
	// given up.
	var out *api.RestoreResponse
	var open *openExchange
	err = c.source.once.begin()
	if err == nil {
		open, err = c.exchange.open(c.s.base, c.s.limits())
	}
	if err == nil {
		rctx, unbind := open.bind(ctx)
		err = c.s.agent.CallDedicated(rctx, func(ctx context.Context, a api.AgentService) (err error) {
			out, err = a.Restore(ctx, req)
			return err
		})
		unbind()
	}
	if err != nil {
		err = c.keepRestoreLog(ctx, err)
		if open != nil {
			open.close()
		}
		err = fmt.Errorf("restore container %s from %s: %w", c.id, c.source.path, adviseFull(err))
		return nil, errclass.Join(err, c.endFailedStart(ctx))
	}
	c.s.releaseConnections(ctx, c.netgateKey())
	c.transition(runningState{c: c})
	if err := c.source.once.confirm(); err != nil {
		log.G(ctx).WithError(err).WithField("container", c.id).Warn("failed to record that the container was restored")
	}
	for _, p := range out.GetPhases() {
		report.Phases = append(report.Phases, metrics.Phase{Name: "guest: " + p.GetName(), Seconds: time.Duration(p.GetNanoseconds()).Seconds()}) //nolint:gosec // likewise
		log.G(ctx).WithFields(log.Fields{"container": c.id, "phase": p.GetName(), "duration": time.Duration(p.GetNanoseconds())}).Info("restore") //nolint:gosec // a guest that lies spoils a log line
	}
	log.G(ctx).WithFields(log.Fields{"container": c.id, "duration": time.Since(begin)}).Info("restored container")
	c.discardImages([]string{restoreDir}, open)
	c.s.stops.Wait(ctx, "restore", "restored")
	return resp, nil
}

func restoreRequest(c *container) *api.RestoreRequest {
	m := c.source.manifest
	r := &api.RestoreRequest{
		ContainerId: c.id,
		Token:       c.exchange.token,
		Directory:   restoreDir,
		Options: &api.CheckpointOptions{
			TcpEstablished: m.Options.TCPEstablished, TcpClose: m.Options.TCPClose, ExternalUnixSockets: m.Options.ExternalUnixSockets,
			Terminal: m.Options.Terminal, FileLocks: m.Options.FileLocks, EmptyNamespaces: m.Options.EmptyNamespaces,
		},
		CriuVersion: m.Guest.CRIUVersion,
		CpuFeatures: m.Guest.CPUFeatures,
		Rights:      c.source.rights,
	}
	for _, e := range m.Externals {
		r.Externals = append(r.Externals, &api.External{Name: e.Name, Destination: e.Destination, Fstype: e.FSType, Device: e.Device})
	}
	for _, s := range m.Stdio {
		r.Stdio = append(r.Stdio, &api.Stdio{Fd: s.FD, Key: s.Key})
	}
	for _, t := range m.Connections {
		r.Connections = append(r.Connections, &api.Connection{Local: t.Local.String(), Remote: t.Remote.String()})
	}
	for _, a := range m.Addresses {
		r.Addresses = append(r.Addresses, &api.Address{Interface: a.Interface, Address: a.Address.String()})
	}
	r.Sockets = imageset.SocketMessages(m.Sockets)
	for _, a := range m.Attributes {
		r.Attributes = append(r.Attributes, &api.Attribute{Pid: a.PID, Thread: a.Thread, Name: a.Name, Value: a.Value})
	}
	for _, f := range m.OpenFiles {
		r.OpenFiles = append(r.OpenFiles, &api.OpenFile{Path: f.Bytes(), Size: f.Size, MayGrow: f.MayGrow})
	}
	return r
}
