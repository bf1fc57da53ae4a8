// SPDX-License-Identifier: Apache-2.0

// Package nri is the NRI plugin: it adjusts the containers of pods with our
// runtime (package internal/adjust) while containerd's CRI creates them.
// Command kata-checkpoint-nri runs it, once per node.
//
// Nothing depends on it: NRI creates containers without a plugin that is not
// connected, and the shim then makes the same adjustment. Only the plugin can
// pass on a pod's annotations whatever containerd's pod_annotations are.
//
// Written against containerd 2.4 and NRI 0.12.
package nri

import (
	"context"
	"fmt"

	"github.com/containerd/log"
	"github.com/containerd/nri/pkg/api"

	"github.com/kata-checkpoint/kata-checkpoint/internal/config"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
)

// Plugin answers NRI's requests.
type Plugin struct {
	handlers []string
	stateDir string
}

// New returns the plugin for a node's configuration, which has to be the one
// that the node's shims read: the names of the exchange directories depend on
// it.
func New(cfg *config.Config) *Plugin {
	return &Plugin{handlers: cfg.NRIRuntimeHandlers, stateDir: cfg.StateDir}
}

// CreateContainer is called by the stub for every container that the CRI
// creates, whatever its runtime. An error fails the creation.
func (p *Plugin) CreateContainer(ctx context.Context, pod *api.PodSandbox, c *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	a, err := p.adjustment(pod, c)
	if err != nil {
		return nil, nil, errclass.ToRPC(fmt.Errorf("kata-checkpoint: adjust container %s of pod %s/%s: %w", c.GetName(), pod.GetNamespace(), pod.GetName(), err))
	}
	if a != nil {
		log.G(ctx).WithFields(log.Fields{"container": c.GetId(), "name": c.GetName(), "pod": pod.GetNamespace() + "/" + pod.GetName()}).Info("adjusted")
	}
	return a, nil, nil
}
