// SPDX-License-Identifier: Apache-2.0

package nri

import (
	"maps"
	"slices"
	"strings"

	"github.com/containerd/nri/pkg/api"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/internal/adjust"
	"github.com/kata-checkpoint/kata-checkpoint/internal/annotations"
	"github.com/kata-checkpoint/kata-checkpoint/internal/version"
)

// namespace is the CRI's, the only one of containerd's that NRI covers.
const namespace = "k8s.io"

// adjustment returns what a container of a pod needs, nil for pods with another
// runtime handler.
//
// The source of the exchange mount does not exist yet: the shim creates it,
// with the token in it, before Kata mounts anything.
func (p *Plugin) adjustment(pod *api.PodSandbox, c *api.Container) (*api.ContainerAdjustment, error) {
	if !slices.Contains(p.handlers, pod.GetRuntimeHandler()) {
		return nil, nil //nolint:nilnil // to NRI, nil means no adjustment
	}
	added := inherited(pod.GetAnnotations(), c.GetAnnotations())
	all := maps.Clone(added)
	maps.Copy(all, c.GetAnnotations())
	a, err := adjust.Adjust(adjust.Container{Namespace: namespace, ID: c.GetId(), Annotations: all, Mounts: ociMounts(c.GetMounts())}, p.stateDir)
	if err != nil {
		return nil, err
	}
	maps.Copy(added, a.Annotations)
	added[annotations.NRIKey] = version.Version

	out := &api.ContainerAdjustment{}
	for key, value := range added {
		out.AddAnnotation(key, value)
	}
	for _, m := range a.Mounts {
		out.AddMount(&api.Mount{Destination: m.Destination, Type: m.Type, Source: m.Source, Options: m.Options})
	}
	return out, nil
}

// inherited returns those of our annotations that a container gets from its
// pod. Its own take precedence.
func inherited(pod, container map[string]string) map[string]string {
	out := make(map[string]string)
	for key, value := range pod {
		if _, own := container[key]; !own && strings.HasPrefix(key, annotations.Prefix) {
			out[key] = value
		}
	}
	return out
}

func ociMounts(mounts []*api.Mount) []specs.Mount {
	out := make([]specs.Mount, 0, len(mounts))
	for _, m := range mounts {
		out = append(out, specs.Mount{Destination: m.GetDestination(), Type: m.GetType(), Source: m.GetSource(), Options: m.GetOptions()})
	}
	return out
}
