// Package plugin is the NRI plugin: it adjusts the containers of our pods as
// package nri says, while containerd's CRI creates them. Command
// kata-checkpoint-nri runs it, once per node.
//
// Nothing depends on it: NRI creates containers without a plugin that is away,
// and the shim then makes the same adjustment. What only the plugin can do is
// to pass a pod's annotations on whatever containerd's pod_annotations say.
package nri

import (
	"context"
	"fmt"

	"github.com/containerd/log"
	"github.com/containerd/nri/pkg/api"

	"github.com/kata-checkpoint/kata-checkpoint/internal/config"
)

// Plugin answers NRI's requests.
type Plugin struct {
	handlers []string
	stateDir string
}

// New returns the plugin for a node's configuration, which has to be the one
// that the node's shims read: both name the exchange directories by it.
func New(cfg *config.Config) *Plugin {
	return &Plugin{handlers: cfg.NRIRuntimeHandlers, stateDir: cfg.StateDir}
}

// CreateContainer is called by the stub for every container that the CRI
// creates, of any runtime. An error fails the container.
func (p *Plugin) CreateContainer(ctx context.Context, pod *api.PodSandbox, c *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	a, err := p.adjustment(pod, c)
	if err != nil {
		return nil, nil, fmt.Errorf("kata-checkpoint: adjust container %s of pod %s/%s: %w", c.GetName(), pod.GetNamespace(), pod.GetName(), err)
	}
	if a != nil {
		log.G(ctx).WithFields(log.Fields{"container": c.GetId(), "name": c.GetName(), "pod": pod.GetNamespace() + "/" + pod.GetName()}).Info("adjusted")
	}
	return a, nil, nil
}
