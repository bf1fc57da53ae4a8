// SPDX-License-Identifier: Apache-2.0

package task

import (
	"context"

	"github.com/containerd/containerd/api/types/runc/options"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/version"
)

var _ api.ShimService = &Service{}

// Check reports to the command kata-checkpoint whether a container could be
// checkpointed now: what the preflight of a checkpoint would find. Nothing is
// frozen.
func (s *Service) Check(ctx context.Context, r *api.CheckRequest) (*api.CheckResponse, error) {
	c, err := s.requireContainer(r.GetContainerId())
	if err != nil {
		return nil, err
	}
	ctx, end := s.operation(ctx)
	defer end()
	st := c.current()
	resp := &api.CheckResponse{State: st.name(), ShimVersion: version.Version}
	if !c.managed() {
		if c.agentErr != nil && !hasStopped(st) {
			resp.Reasons = []string{errcode.Text(c.explain(c.agentErr))}
		} else {
			resp.Reasons = []string{"the container is " + st.name() + ", and only one that runs or is paused can be checkpointed: start it"}
		}
		return resp, nil
	}
	var info *api.InfoResponse
	err = s.callAgent(ctx, func(ctx context.Context, a api.AgentService) (err error) {
		info, err = a.Info(ctx, &api.InfoRequest{Check: true})
		return err
	})
	if err != nil {
		resp.Reasons = []string{errcode.Text(err)}
		return resp, nil
	}
	resp.AgentVersion, resp.CriuVersion, resp.KernelRelease = info.GetVersion(), info.GetCriuVersion(), info.GetKernelRelease()
	resp.Reasons = info.GetProblems()
	var opts *options.CheckpointOptions // the engine decides nothing
	resp.Stops, err = stopsAfterCheckpoint(opts, c.annotations, s.cfg)
	if err != nil {
		resp.Reasons = append(resp.Reasons, errcode.Text(err))
	}
	criu, err := criuOptions(opts, c.annotations)
	if err != nil {
		resp.Reasons = append(resp.Reasons, errcode.Text(err))
		return resp, nil
	}
	if st.frozen() {
		resp.Unchecked = true
		return resp, nil
	}
	j := &checkpointJob{c: c, checkpointRequest: &checkpointRequest{options: criu, stop: resp.Stops}}
	err = s.callAgent(ctx, func(ctx context.Context, a api.AgentService) error {
		_, err := a.CheckCheckpoint(ctx, j.request())
		return err
	})
	if err != nil {
		resp.Reasons = append(resp.Reasons, errcode.Text(err))
	}
	return resp, nil
}
