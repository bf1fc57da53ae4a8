// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v2"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/containerd/v2/pkg/protobuf"
	"github.com/containerd/log"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/kata-checkpoint/kata-checkpoint/internal/adjust"
	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/metrics"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/bundle"
)

// create prepares a container so that it can be checkpointed, or is restored at
// Start, and has Kata create it. If the agent is not reachable afterwards,
// Start reports it: engines do not clean up after a Create that has failed.
func (s *Service) create(ctx context.Context, r *task.CreateTaskRequest) (_ *task.CreateTaskResponse, err error) {
	begin := time.Now()
	end, err := s.noteTemporary(ctx, r)
	if err != nil {
		return nil, fmt.Errorf("create container %s: %w", r.ID, adviseFull(err))
	}
	defer func() { end(err) }()
	spec, err := bundle.ReadSpec(r.Bundle)
	if err != nil {
		return nil, errclass.Invalid(errcode.Bundle, "create container %s: %w", r.ID, err)
	}
	kind, _, err := annotations.Place(r.ID, spec.Annotations)
	if err != nil {
		return nil, errclass.Invalid(errcode.Bundle, "create container %s: %w", r.ID, err)
	}
	if err := s.normalizeOptions(r); err != nil {
		return nil, fmt.Errorf("create container %s: %w", r.ID, err)
	}
	c := newContainer(s, r, spec, kind)
	defer func() {
		if err != nil {
			err = errclass.Join(err, c.exchange.remove())
		}
	}()
	next := state(createdState{c: c})
	switch {
	case kind == annotations.Sandbox && r.Checkpoint != "":
		return nil, errclass.Invalid(errcode.SandboxRestore, "container %s is its pod's sandbox: only the other containers of a pod can be restored", r.ID)
	case kind == annotations.Sandbox:
		next = unmanagedState{c: c, reason: errcode.NoWorkload.Wrap(errors.New("it is its pod's sandbox, without a workload"))}
	default:
		if err := c.prepare(ctx, r, spec); err != nil {
			return nil, fmt.Errorf("create container %s: %w", r.ID, adviseFull(err))
		}
	}

	s.closeNetgate(ctx, c, spec)
	s.events.Expect(r.ID, "")
	// A containerd that has been restarted may ask for the container before Kata's
	// Create has ended.
	c.slot <- struct{}{}
	defer func() { <-c.slot }()
	// Until then its process is this one: containerd deletes a container without
	// any.
	c.state = creatingState{c: c, answer: createdResponse(r, uint32(os.Getpid())), next: next} //nolint:gosec // PIDs are positive
	// Before Kata's events for it arrive.
	s.add(c)
	resp := &task.CreateTaskResponse{}
	err = s.forwardDetached(ctx, "Create", r, resp)
	s.protectShare(ctx, r.ID)
	if err != nil {
		s.remove(r.ID)
		return nil, err
	}
	if c.exchange != nil {
		c.exchange.shut(s.base)
	}
	c.stateCache.Store("", createdResponse(r, resp.GetPid()))
	c.transition(next)
	if r.ID == s.sandbox {
		if err := bundle.SetVM(r.Bundle, int(resp.GetPid())); err != nil {
			log.G(ctx).WithError(err).WithField("container", r.ID).Warn("failed to record the VM's process")
		}
		s.vmBundle.Store(&r.Bundle)
		s.watchFiles()
	}
	created := time.Since(begin)
	if c.source != nil {
		s.stops.Wait(ctx, "restore", "create")
	}
	if kind != annotations.Sandbox {
		c.agentErr = s.awaitAgent(ctx, c)
	}
	logger := log.G(ctx).WithFields(log.Fields{"container": c.id, "created": created, "duration": time.Since(begin)})
	if c.agentErr != nil {
		logger = logger.WithError(c.agentErr)
	}
	logger.Info("created container")
	return resp, nil
}

// prepare edits the bundle before Kata reads it.
func (c *container) prepare(ctx context.Context, r *task.CreateTaskRequest, spec *bundle.Spec) error {
	cfg := c.s.cfg
	if _, marked := spec.Annotations[annotations.NRIKey]; !marked && annotations.MadeByCRI(spec.Annotations) {
		log.G(ctx).WithField("container", c.id).Info("container was not adjusted by the NRI plugin, adjusting it in the shim")
	}
	a, err := adjust.Adjust(adjust.Container{Namespace: c.s.namespace, ID: c.id, Annotations: spec.Annotations, Mounts: spec.Mounts}, cfg.StateDir)
	if err != nil {
		return errclass.Invalid(errcode.Annotation, "%w", err)
	}
	if err := spec.Adjust(a); err != nil {
		return err
	}
	if c.annotations = spec.Annotations; c.annotations == nil {
		c.annotations = map[string]string{}
	}
	if c.externals, err = annotations.ExternalMounts(c.annotations); err != nil {
		return errclass.Invalid(errcode.Annotation, "%w", err)
	}
	// Checked at Create, while a mistake can still be corrected.
	if _, err := stopsAfterCheckpoint(nil, c.annotations, cfg); err != nil {
		return errclass.Invalid(errcode.Annotation, "%w", err)
	}
	if _, err := annotations.TCP(c.annotations); err != nil {
		return errclass.Invalid(errcode.Annotation, "%w", err)
	}
	if c.thawAt, err = annotations.Thaw(c.annotations); err != nil {
		return errclass.Invalid(errcode.Annotation, "%w", err)
	}
	if err := c.choosePreDumps(); err != nil {
		return errclass.Invalid(errcode.Annotation, "%w", err)
	}
	if _, err := annotations.Address(c.annotations); err != nil {
		return errclass.Invalid(errcode.Annotation, "%w", err)
	}
	if c.exchange, err = newExchange(cfg.StateDir, c.s.namespace, c.id, c.s.setWritable); err != nil {
		return err
	}
	name, err := c.archiveName()
	switch {
	case err != nil:
		return err
	case r.Checkpoint != "" || name != "":
		measured := c.s.metrics.Begin(metrics.Restore)
		if r.Checkpoint != "" { // the engine's request overrides the annotation
			err = c.prepareRestore(ctx, r, spec)
		} else {
			err = c.prepareArchive(ctx, name, r, spec)
		}
		if err != nil {
			measured.End(*c.newReport(ctx), err)
		}
		measured.Drop() // Start reports the rest
	}
	if err != nil {
		return err
	}
	return spec.Write()
}

// normalizeOptions turns the request's options into what Kata can read.
func (s *Service) normalizeOptions(r *task.CreateTaskRequest) error {
	if r.Options != nil && r.Options.GetTypeUrl() == "" {
		// `ctr containers restore` sends an empty Any, on which Kata's Go shim fails.
		r.Options = nil
	}
	if r.Checkpoint != "" && r.Options.MessageIs(&runcoptions.Options{}) {
		// With these a client has named the checkpoint, and they mean nothing to
		// Kata, which needs the configuration that they stand in place of.
		r.Options = nil
	}
	if r.Options != nil || s.cfg.KataConfigPath == "" {
		return nil
	}
	options, err := anypb.New(&runtimeoptions.Options{ConfigPath: s.cfg.KataConfigPath})
	if err != nil {
		return fmt.Errorf("encode the options for Kata: %w", err)
	}
	// Kata's Rust shim accepts only the bare name, which is what containerd
	// writes.
	options.TypeUrl = string(options.MessageName())
	r.Options = options
	return nil
}

// createdResponse is what State would answer right after Create.
func createdResponse(r *task.CreateTaskRequest, pid uint32) *task.StateResponse {
	return &task.StateResponse{
		ID: r.ID, Bundle: r.Bundle, Pid: pid, Status: statusCreated,
		Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal, ExitedAt: protobuf.ToTimestamp(time.Time{}),
	}
}
