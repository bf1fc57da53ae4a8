// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/typeurl/v2"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/testbed"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// containerdRelease: exit-and-restore, and what differs between containerd's
// releases: what a shim is given to start with and what is made of its answer,
// when it is told to shut down, and how it is found again.
func containerdRelease(s *scenario) {
	version, err := s.engine.Client.Version(s.ctx)
	s.check(err)
	release, _, _ := strings.Cut(strings.TrimPrefix(s.Name(), "TestScenario/containerd-"), "/")
	if !strings.HasPrefix(strings.TrimPrefix(version.Version, "v"), release+".") {
		s.Fatalf("this is containerd %s", version.Version)
	}
	s.step("containerd is %s", version.Version)
	exitAndRestore(s)

	// A shim's start gets the options of its container, which the first one had
	// none of; a pod's containers share the shim of its sandbox.
	sandbox := s.withID(engine.Container{
		ID: "pod", Args: []string{workload.Path, "idle"}, Annotations: map[string]string{"io.kubernetes.cri.container-type": "sandbox"},
	})
	sandbox.RuntimeOptions, err = typeurl.MarshalAny(&runtimeoptions.Options{ConfigPath: s.testbed.KataConfig()})
	s.check(err)
	container, err := s.engine.Create(s.ctx, sandbox)
	s.check(err)
	pod := &pod{s: s, sandbox: container}
	s.run(container)
	first, second := pod.create(counter("first")), pod.create(engine.Container{ID: "second", Args: []string{workload.Path, "idle"}})
	run, other := s.run(first), s.run(second)
	address := s.bootstrap(sandbox.ID)
	for _, c := range []client.Container{first, second} {
		if have := s.bootstrap(c.ID()); have != address {
			s.Errorf("%s is served at %s, and its pod at %s", c.ID(), have, address)
		}
	}

	s.killContainerd()
	s.startContainerd(run, other)
	s.checkKeepsCounting(run)

	// From 2.4 on a shim is told to shut down with each container that is
	// deleted.
	s.check(other.Kill(s.ctx, syscall.SIGKILL))
	s.waitExit(other, 137)
	s.checkStatus(run, client.Running)
	s.checkKeepsCounting(run)
	dir := s.checkpoint(run, true)
	s.waitExit(run, 137)
	before := s.printedNumbers(run.Output, workload.Ticks)
	s.checkConsecutive(1, append(before, s.waitNumbers(s.restore(first, dir).Output, workload.Ticks, 3)...))
	s.remove(first)
	s.remove(second)
	s.remove(container)
	for _, complaint := range []string{"failed to invoke shutdown", "failed to shutdown shim", "failed to delete shim"} {
		if s.hasLogged(complaint) {
			s.Errorf("containerd says: %s", complaint)
		}
	}
}

// bootstrap gives the address at which containerd reaches a container's shim,
// and checks how.
func (s *scenario) bootstrap(id string) string {
	s.Helper()
	data, err := os.ReadFile(filepath.Join(s.testbed.Dir, "run/io.containerd.runtime.v2.task", testbed.Namespace, id, "bootstrap.json"))
	s.check(err)
	var b struct {
		Version  int
		Address  string
		Protocol string
	}
	s.check(json.Unmarshal(data, &b))
	if b.Version != 2 || b.Protocol != "ttrpc" || !strings.HasPrefix(b.Address, "unix:///") {
		s.Errorf("%s has the bootstrap %s", id, data)
	}
	return b.Address
}
