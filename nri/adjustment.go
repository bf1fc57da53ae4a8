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

// namespace is the only one of containerd's that NRI sees, the CRI's.
const namespace = "k8s.io"

// adjustment returns what a container of a pod needs, nil where the pod is not
// one of ours.
//
// The exchange mount names a directory that does not exist yet: the shim makes
// it, with the token in it, before Kata mounts anything.
func (p *Plugin) adjustment(pod *api.PodSandbox, c *api.Container) (*api.ContainerAdjustment, error) {
	if !slices.Contains(p.handlers, pod.GetRuntimeHandler()) {
		return nil, nil //nolint:nilnil // NRI's way of saying that there is nothing to adjust
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

// inherited are the annotations of ours that a container gets from its pod.
// What it says itself is the more particular word.
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
