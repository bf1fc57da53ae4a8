// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"strings"

	"github.com/kata-checkpoint/kata-checkpoint/integration/cri"
	"github.com/kata-checkpoint/kata-checkpoint/integration/parts"
	"github.com/kata-checkpoint/kata-checkpoint/integration/testbed"
)

// withoutNRI ends the NRI plugin until the scenario's end.
func (s *scenario) withoutNRI() {
	s.Helper()
	s.check(s.testbed.KillNRI(s.ctx))
	s.afterContainers(func() error { return s.testbed.StartNRI(context.WithoutCancel(s.ctx)) })
	s.step("the NRI plugin has ended")
}

// isAdjusted reports whether the NRI plugin has seen a container: it leaves a
// marker.
func (s *scenario) isAdjusted(c *cri.Container) bool {
	s.Helper()
	spec := s.specOf(c)
	_, marked := spec.Annotations["kata-checkpoint.dev/nri"]
	mounted := false
	for _, m := range spec.Mounts {
		mounted = mounted || strings.HasPrefix(m.Destination, "/.kata-checkpoint")
	}
	if marked != mounted {
		s.Errorf("%s: a marker: %v, a mount: %v", c.Name, marked, mounted)
	}
	return marked
}

// nriAbsent: without the plugin, containers can be checkpointed all the same.
func nriAbsent(s *scenario) {
	s.withoutNRI()
	// Its annotations come by containerd's own way.
	pod := s.runPod("alone", cri.PodSpec{Annotations: map[string]string{"kata-checkpoint.dev/after": "stop"}})
	c := s.runIn(pod, counterNamed("c"))
	if s.isAdjusted(c) {
		s.Errorf("the plugin that is gone has adjusted the container")
	}
	if !s.hasLogged("not adjusted by the NRI plugin") {
		s.Errorf("nothing in the log says that the plugin was missed")
	}
	s.waitTicks(c, 5)
	archive := s.archive("c")
	s.check(c.Checkpoint(s.ctx, archive))
	code, err := c.Ended(s.ctx)
	s.check(err)
	if code != 137 {
		s.Errorf("the container ended with %d", code)
	}
	before := s.waitTicks(c, 5)
	s.check(pod.Remove(s.ctx))

	pod = s.runPod("after", cri.PodSpec{Annotations: fromArchive(archive)})
	s.checkConsecutive(1, append(before, s.waitTicks(s.runIn(pod, counterNamed("c")), 5)...))
}

// nriRestarted: the plugin adjusts containers again once it is there again, and
// when containerd was restarted.
func nriRestarted(s *scenario) {
	pod := s.runPod("adjusted", cri.PodSpec{Annotations: map[string]string{"kata-checkpoint.dev/tcp": "close"}})
	create := func(name string) *cri.Container {
		s.Helper()
		c, err := pod.Create(s.ctx, cri.ContainerSpec{Name: name, Image: parts.WorkloadImageName, Args: []string{"true"}})
		s.check(err)
		return c
	}
	first := create("first")
	if !s.isAdjusted(first) {
		s.Errorf("the plugin has not adjusted the first container")
	}
	if have := s.specOf(first).Annotations["kata-checkpoint.dev/tcp"]; have != "close" {
		s.Errorf("the pod's annotation is %q in the container", have)
	}
	s.check(s.testbed.KillNRI(s.ctx))
	if s.isAdjusted(create("without")) {
		s.Errorf("the plugin that is gone has adjusted a container")
	}
	s.check(s.testbed.StartNRI(s.ctx))
	if !s.isAdjusted(create("again")) {
		s.Errorf("the plugin that was started again has not adjusted a container")
	}
	s.step("the plugin was started again")

	s.killContainerd()
	s.startContainerd()
	s.check(s.testbed.cri.Ready(s.ctx))
	s.step("containerd was started again")
	n := 0
	if !s.eventually(settleTimeout, func() bool {
		n++
		return s.isAdjusted(create("after-" + strings.Repeat("x", n)))
	}) {
		s.Errorf("the plugin does not come back to a containerd that was started again")
	}
}

// nriOtherRuntimeUntouched: a pod of another runtime has nothing of ours.
func nriOtherRuntimeUntouched(s *scenario) {
	pod := s.runPodWith(s.testbed.cri.With(testbed.DownstreamHandler), "other", cri.PodSpec{Annotations: map[string]string{"kata-checkpoint.dev/after": "stop"}})
	c := s.runIn(pod, counterNamed("c"))
	s.waitTicks(c, 3)
	spec := s.specOf(c)
	for key := range spec.Annotations {
		if strings.HasPrefix(key, "kata-checkpoint.dev/") {
			s.Errorf("the container has the annotation %s", key)
		}
	}
	if s.isAdjusted(c) {
		s.Errorf("the plugin has adjusted a container of another runtime")
	}
}
