// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// hooksInSpec: a container with the hooks, mounts and annotations that nerdctl
// gives to every one. The hooks, which set up a network and take it away, run
// once for each life of the container. Kata's Rust shim runs no guest hook for
// such a container.
func hooksInSpec(s *scenario) {
	dir := s.newDir()
	ran := filepath.Join(dir, "ran")
	hook := func(name string) []specs.Hook {
		path := filepath.Join(dir, name)
		// A runtime gives the hook the container's state on its stdin.
		script := fmt.Sprintf("#!/bin/sh\nstate=$(cat)\ncase $state in *'\"id\"'*) echo %s >> %s;; esac\n", name, ran)
		s.check(os.WriteFile(path, []byte(script), 0o700))
		return []specs.Hook{{Path: path, Args: []string{path, "internal", "oci-hook", name}, Env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}}}
	}
	hooks := func(want ...string) {
		s.Helper()
		var have []string
		if !s.eventually(settleTimeout, func() bool {
			data, _ := os.ReadFile(ran)
			have = strings.Fields(string(data))
			return len(have) >= len(want)
		}) || !slices.Equal(have, want) {
			s.Errorf("the hooks %v have run, not %v", have, want)
		}
	}
	hosts := filepath.Join(dir, "hosts")
	write := func(text string) { s.check(os.WriteFile(hosts, []byte(text), 0o644)) }

	c := counter("c")
	c.Hooks = &specs.Hooks{CreateRuntime: hook("createRuntime"), Poststop: hook("poststop")}
	c.Annotations = map[string]string{"nerdctl/name": "c", "nerdctl/networks": `["bridge"]`}
	c.Mounts = []specs.Mount{{Type: "bind", Source: hosts, Destination: "/etc/hosts", Options: []string{"bind", "rprivate"}}}
	write("10.4.0.2 first\n")
	container := s.create(c)
	first := s.run(container)
	hooks("createRuntime")
	s.waitNumbers(first.Output, workload.Ticks, 5)
	images := s.newDir()
	s.check(s.engine.CheckpointByDefault(s.ctx, first, images))
	s.step("checkpointed as nerdctl does")
	s.waitExit(first, 137)
	hooks("createRuntime", "poststop")
	before := s.printedNumbers(first.Output, workload.Ticks)

	// nerdctl rewrites it at every start: the address is another.
	write("10.4.0.33 restored\n")
	restored := s.restore(container, images)
	hooks("createRuntime", "poststop", "createRuntime")
	s.checkConsecutive(1, append(before, s.waitNumbers(restored.Output, workload.Ticks, 5)...))
	s.checkOtherVM(first, restored)
	if lines := s.shell(restored, "cat /etc/hosts"); !slices.Equal(lines, []string{"10.4.0.33 restored"}) {
		s.Errorf("/etc/hosts has %q", lines)
	}
	s.remove(container)
	hooks("createRuntime", "poststop", "createRuntime", "poststop")
	s.checkExitEvents(container, 137, 137)
}
