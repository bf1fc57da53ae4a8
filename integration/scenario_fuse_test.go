// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"strings"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// servesFiles: a container that serves a file system to itself, and is frozen
// together with the server, is paused and resumed like any other, and a checkpoint
// of it is refused at once, whether or not it is paused, wherever the file system is
// mounted. Nothing waits for the server.
func servesFiles(s *scenario) {
	counting := counter("c")
	counting.Mounts = []specs.Mount{s.casesMount()}
	counting.Spec = []oci.SpecOpts{oci.WithPrivileged, oci.WithAllDevicesAllowed}
	c := s.create(counting)
	run := s.run(c)
	s.check(run.Pause(s.ctx)) // the first one loads CRIU
	s.check(run.Resume(s.ctx))
	for name, prefix := range map[string]string{"in the container": "", "in a mount namespace of its own": "unshare -m "} {
		s.step("%s", name)
		s.shell(run, prefix+casesDir+"fuse /served >/tmp/case 2>&1 & true")
		rounds := func() int {
			lines := s.shell(run, "cat /tmp/case")
			for _, line := range lines {
				if !strings.HasPrefix(line, "round ") {
					s.Fatalf("%s: its user has printed %q", name, lines)
				}
			}
			return len(lines)
		}
		if !s.eventually(caseTimeout, func() bool { return rounds() >= 2 }) {
			s.Fatalf("%s: it has not begun", name)
		}
		for range 2 {
			s.checkPrompt("a pause", func() { s.check(run.Pause(s.ctx)) })
			s.checkStatus(run, client.Paused)
			// Engines pause before they checkpoint.
			s.checkPrompt("a refusal while it is paused", func() {
				s.checkRefused(name, run, s.newDir(), "type fuse at /served", "unmount it")
			})
			s.checkStatus(run, client.Paused)
			s.checkPrompt("a resume", func() { s.check(run.Resume(s.ctx)) })
			s.checkStatus(run, client.Running)
		}
		s.checkRefused(name, run, s.newDir(), "type fuse at /served", "unmount it")
		s.checkKeepsCounting(run)
		if at := rounds(); !s.eventually(caseTimeout, func() bool { return rounds() >= at+2 }) {
			s.Errorf("%s: the file system is no longer used", name)
		}
		s.shell(run, "killall -9 fuse; umount -l /served 2>/dev/null; rm -f /tmp/case; true")
	}
	dir := s.checkpoint(run, true)
	s.waitExit(run, 137)
	before := s.printedNumbers(run.Output, workload.Ticks)
	restored := s.restore(c, dir)
	s.checkConsecutive(1, append(before, s.waitNumbers(restored.Output, workload.Ticks, 5)...))
}
