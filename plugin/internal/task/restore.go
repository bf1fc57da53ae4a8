package task

import (
	"context"
	"errors"
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
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/bundle"
)

// source is the image set that a container is restored from.
type source struct {
	manifest *imageset.Manifest
	// path is that of the image set, or of the archive that it was in.
	path string
	// rights are what the container may do that the image set is restored into.
	rights *api.Rights
	// done notes that the restore has succeeded; nil where nobody asks for that.
	done func() error
}

// prepareRestore takes the image set over and puts the placeholder in the
// container's place. Nothing has reached Kata yet, so that what is wrong with
// the image set costs nothing.
func (c *container) prepareRestore(ctx context.Context, r *task.CreateTaskRequest, spec *bundle.Spec) error {
	begin := time.Now()
	path := r.Checkpoint
	// Nobody else removes it, whether it could be used or not: `delete` does
	// should this process be killed.
	if err := bundle.SetTemporary(c.bundle, path); err != nil {
		return fmt.Errorf("restore: %w", err)
	}
	defer func() {
		if err := errors.Join(bundle.RemoveTemporary(path), bundle.SetTemporary(c.bundle, "")); err != nil {
			log.G(ctx).WithError(err).Warn("remove containerd's temporary copy of the checkpoint")
		}
	}()
	ctx, end := c.s.operation(ctx)
	defer end()
	rights := rightsOf(spec.Process)
	manifest, err := c.stageImages(ctx, path, r.Rootfs, spec, nil)
	if err != nil {
		return errclass.With(errdefs.ErrFailedPrecondition, fmt.Errorf("restore from %s: %w", path, err))
	}
	if err := c.setPlaceholder(spec); err != nil {
		return err
	}
	c.source = &source{manifest: manifest, path: path, rights: rights}
	r.Checkpoint = "" // Kata is to start what looks like any other container
	c.logStaged(ctx, begin)
	return nil
}

// stageImages checks the image set in the directory path, copies it to where the
// guest will see it, and applies the changes of the root file system that lie
// beside it. may says what else has to be so.
func (c *container) stageImages(ctx context.Context, path string, rootfs []*types.Mount, spec *bundle.Spec, may func(*imageset.Manifest) error) (*imageset.Manifest, error) {
	set, err := imageset.Open(path)
	if err != nil {
		return nil, err
	}
	defer set.Close()
	if may != nil {
		err = may(set.Manifest)
	}
	if err == nil {
		err = checkFit(set.Manifest, spec.Spec, annotations.ImageName(c.annotations), c.terminal)
	}
	if err != nil {
		return nil, err
	}
	if err := set.CopyTo(ctx, c.exchange.path(restoreDir)); err != nil {
		return nil, err
	}
	if err := applyRootfsDiff(ctx, path, rootfs); err != nil {
		return nil, err
	}
	return set.Manifest, nil
}

func (c *container) logStaged(ctx context.Context, begin time.Time) {
	log.G(ctx).WithFields(log.Fields{
		"container": c.id, "phase": "stage images", "duration": time.Since(begin), "bytes": c.source.manifest.Bytes(), "from": c.source.path,
	}).Info("restore")
	c.s.stops.Wait(ctx, "restore", "stage images")
}

// fits says all that differs between what was checkpointed and what it is to
// be restored into, where the restore could not work or would be another
// container's.
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
	if len(errs) > 0 {
		return errors.New("the checkpoint does not fit this container: " + strings.Join(errs, "; "))
	}
	return nil
}

// otherImage says whether two images are known to be different ones. The CRI
// gives an image by the name that the pod has for it, or by its id, as when it
// restores a container itself: a name and an id say nothing of each other.
func otherImage(a, b string) bool {
	const id = "sha256:"
	return a != "" && b != "" && strings.HasPrefix(a, id) == strings.HasPrefix(b, id) && a != b
}

// rightsOf are what a container may do, by its specification. One that names no
// capabilities bounds none.
func rightsOf(p *specs.Process) *api.Rights {
	if p == nil || p.Capabilities == nil {
		return nil
	}
	return &api.Rights{Capabilities: p.Capabilities.Bounding, NoNewPrivs: p.NoNewPrivileges, Uid: p.User.UID}
}

// setPlaceholder makes the container's first process the one below which the
// agent restores the others.
func (c *container) setPlaceholder(spec *bundle.Spec) error {
	binary := filepath.Join(c.s.cfg.GuestBundle, api.AgentBinary)
	if st, err := os.Stat(binary); err != nil || !st.Mode().IsRegular() {
		return errclass.Precondition("restore: %s is not there: install the guest bundle on this machine and name its directory by guest_bundle in config.toml", binary)
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
		// It passes signals on to processes of other users.
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
	// The restored processes are the placeholder's to reap, which in a shared
	// pid namespace they would not be.
	return spec.OwnPIDNamespace()
}

// startRestored starts the placeholder and restores the image set below it.
// When that fails, nothing stays alive.
func (c *container) startRestored(ctx context.Context, r *task.StartRequest) (*task.StartResponse, error) {
	begin := time.Now()
	c.s.stops.Wait(ctx, "restore", "adopt")
	req := restoreRequest(c)
	err := c.s.agent.CallIdempotent(ctx, func(ctx context.Context, a api.AgentService) error {
		_, err := a.CheckRestore(ctx, req)
		return err
	})
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		c.stopPlaceholder(ctx, r)
		return nil, fmt.Errorf("restore container %s from %s: %w", c.id, c.source.path, err)
	}
	resp := &task.StartResponse{}
	if err := c.s.forwardDetached(ctx, "Start", r, resp); err != nil {
		return nil, err
	}
	c.s.stops.Wait(ctx, "restore", "start")
	var out *api.RestoreResponse
	err = c.s.agent.CallDedicated(ctx, func(ctx context.Context, a api.AgentService) (err error) {
		out, err = a.Restore(ctx, req)
		return err
	})
	if err != nil {
		uctx, cancel := cleanupContext(ctx)
		defer cancel()
		err = fmt.Errorf("restore container %s from %s: %w", c.id, c.source.path, err)
		if kerr := c.killAndWait(uctx); kerr != nil {
			err = errors.Join(err, kerr)
		}
		return nil, err
	}
	c.transition(runningState{c: c})
	if c.source.done != nil {
		if err := c.source.done(); err != nil {
			log.G(ctx).WithError(err).WithField("container", c.id).Warn("note that the container was restored")
		}
	}
	for _, p := range out.GetPhases() {
		log.G(ctx).WithFields(log.Fields{"container": c.id, "phase": p.GetName(), "duration": time.Duration(p.GetNanoseconds())}).Info("restore") //nolint:gosec // a guest that lies spoils a log line
	}
	log.G(ctx).WithFields(log.Fields{"container": c.id, "duration": time.Since(begin)}).Info("restored")
	c.discardImages(restoreDir)
	c.s.stops.Wait(ctx, "restore", "restored")
	return resp, nil
}

func restoreRequest(c *container) *api.RestoreRequest {
	m := c.source.manifest
	r := &api.RestoreRequest{
		ContainerId: c.id,
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
	for _, f := range m.OpenFiles {
		r.OpenFiles = append(r.OpenFiles, &api.OpenFile{Path: f.Path, Size: f.Size})
	}
	return r
}
