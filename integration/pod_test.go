package integration

import (
	"maps"

	"github.com/containerd/containerd/v2/client"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// pod is a VM for several containers, as the CRI makes it: a sandbox's container comes first.
type pod struct {
	s       *scenario
	sandbox client.Container
}

// pod starts one.
func (s *scenario) pod() *pod {
	s.Helper()
	c := s.create(engine.Container{
		ID: "pod", Args: []string{workload.Path, "idle"}, Annotations: map[string]string{"io.kubernetes.cri.container-type": "sandbox"},
	})
	s.run(c)
	return &pod{s: s, sandbox: c}
}

// create makes a container of the pod.
func (p *pod) create(c engine.Container) client.Container {
	p.s.Helper()
	annotations := map[string]string{"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": p.sandbox.ID()}
	maps.Copy(annotations, c.Annotations)
	c.Annotations = annotations
	return p.s.create(c)
}
