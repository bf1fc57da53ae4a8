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
	s.check(s.bed.KillNRI(s.ctx))
	s.later(func() error { return s.bed.StartNRI(context.WithoutCancel(s.ctx)) })
	s.step("the NRI plugin has ended")
}

// adjusted tells whether the NRI plugin has seen a container: it leaves a marker.
func (s *scenario) adjusted(c *cri.Container) bool {
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
	if s.adjusted(c) {
		s.Errorf("the plugin that is gone has adjusted the container")
	}
	if !s.logged("not adjusted by the NRI plugin") {
		s.Errorf("nothing in the log says that the plugin was missed")
	}
	s.ticked(c, 5)
	archive := s.archive("c")
	s.check(c.Checkpoint(s.ctx, archive))
	code, err := c.Ended(s.ctx)
	s.check(err)
	if code != 137 {
		s.Errorf("the container ended with %d", code)
	}
	before := s.ticked(c, 5)
	s.check(pod.Remove(s.ctx))

	pod = s.runPod("after", cri.PodSpec{Annotations: fromArchive(archive)})
	s.consecutive(1, append(before, s.ticked(s.runIn(pod, counterNamed("c")), 5)...))
}

// nriRestarted: the plugin adjusts containers again once it is there again, and when containerd was started anew.
func nriRestarted(s *scenario) {
	pod := s.runPod("adjusted", cri.PodSpec{Annotations: map[string]string{"kata-checkpoint.dev/tcp": "close"}})
	create := func(name string) *cri.Container {
		s.Helper()
		c, err := pod.Create(s.ctx, cri.ContainerSpec{Name: name, Image: parts.WorkloadImageName, Args: []string{"true"}})
		s.check(err)
		return c
	}
	first := create("first")
	if !s.adjusted(first) {
		s.Errorf("the plugin has not adjusted the first container")
	}
	if have := s.specOf(first).Annotations["kata-checkpoint.dev/tcp"]; have != "close" {
		s.Errorf("the pod's annotation is %q in the container", have)
	}
	s.check(s.bed.KillNRI(s.ctx))
	if s.adjusted(create("without")) {
		s.Errorf("the plugin that is gone has adjusted a container")
	}
	s.check(s.bed.StartNRI(s.ctx))
	if !s.adjusted(create("again")) {
		s.Errorf("the plugin that was started again has not adjusted a container")
	}
	s.step("the plugin was started again")

	s.killContainerd()
	s.startContainerd()
	s.check(s.bed.cri.Ready(s.ctx))
	s.step("containerd was started again")
	n := 0
	if !s.eventually(settleTimeout, func() bool {
		n++
		return s.adjusted(create("after-" + strings.Repeat("x", n)))
	}) {
		s.Errorf("the plugin does not come back to a containerd that was started again")
	}
}

// nriOtherRuntimeUntouched: a pod of another runtime has nothing of ours.
func nriOtherRuntimeUntouched(s *scenario) {
	pod := s.runPodWith(s.bed.cri.With(testbed.DownstreamHandler), "other", cri.PodSpec{Annotations: map[string]string{"kata-checkpoint.dev/after": "stop"}})
	c := s.runIn(pod, counterNamed("c"))
	s.ticked(c, 3)
	spec := s.specOf(c)
	for key := range spec.Annotations {
		if strings.HasPrefix(key, "kata-checkpoint.dev/") {
			s.Errorf("the container has the annotation %s", key)
		}
	}
	if s.adjusted(c) {
		s.Errorf("the plugin has adjusted a container of another runtime")
	}
}
