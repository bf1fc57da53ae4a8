// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"fmt"
	"maps"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// pod is a VM for several containers, as the CRI makes it: a sandbox's
// container comes first.
type pod struct {
	s       *scenario
	sandbox client.Container
}

// startPod starts one.
func (s *scenario) startPod() *pod {
	s.Helper()
	return s.startPodNamed("pod")
}

// startPodNamed starts one beside others.
func (s *scenario) startPodNamed(name string) *pod {
	s.Helper()
	c := s.create(engine.Container{
		ID: name, Args: []string{workload.Path, "idle"}, Annotations: map[string]string{"io.kubernetes.cri.container-type": "sandbox"},
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

// withPodPIDs has a container be in the pid namespace of the pod.
func (p *pod) withPodPIDs(c engine.Container) engine.Container {
	p.s.Helper()
	task, err := p.sandbox.Task(p.s.ctx, nil)
	p.s.check(err)
	path := fmt.Sprintf("/proc/%d/ns/pid", task.Pid())
	c.Spec = append(c.Spec, oci.WithLinuxNamespace(specs.LinuxNamespace{Type: specs.PIDNamespace, Path: path}))
	return c
}
