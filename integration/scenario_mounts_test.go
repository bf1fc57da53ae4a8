// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"slices"
	"strings"

	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/parts"
	"github.com/kata-checkpoint/kata-checkpoint/integration/testbed"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

func bind(source, destination string, options ...string) specs.Mount {
	return specs.Mount{Type: "bind", Source: source, Destination: destination, Options: append([]string{"rbind"}, options...)}
}

// volumesAndFiles: files that processes hold open come back, wherever they are.
// A restore that would have to fail because one has changed says which. While
// the container is paused the host sees what it has written last, by a mapping,
// too.
func volumesAndFiles(s *scenario) {
	volume, etc := s.newDir(), s.newDir()
	for name, content := range map[string]string{"hosts": "127.0.0.1 localhost\n", "resolv.conf": "nameserver 127.0.0.1\n"} {
		s.check(os.WriteFile(filepath.Join(etc, name), []byte(content), 0o644))
	}
	c := s.create(engine.Container{
		ID:   "c",
		Args: []string{workload.Path, "files", "--volume", "/data/records", "--constant", "/etc/hosts", "--constant", "/etc/resolv.conf"},
		Mounts: []specs.Mount{
			bind(volume, "/data", "rw"),
			bind(filepath.Join(etc, "hosts"), "/etc/hosts", "ro"),
			bind(filepath.Join(etc, "resolv.conf"), "/etc/resolv.conf", "ro"),
		},
	})
	first := s.run(c)
	s.waitNumbers(first.Output, workload.Rounds, 5)
	s.check(first.Pause(s.ctx))
	rounds := s.printedNumbers(first.Output, workload.Rounds)
	mapped, err := os.ReadFile(filepath.Join(volume, "mapped"))
	s.check(err)
	if n := binary.LittleEndian.Uint64(mapped); n < uint64(rounds[len(rounds)-1]) {
		s.Errorf("of a paused container's mapping the host sees round %d, and %d have been printed", n, len(rounds))
	}
	s.check(first.Resume(s.ctx))
	dir := s.checkpoint(first, true)
	s.waitExit(first, 137)
	before := s.printedNumbers(first.Output, workload.Rounds)

	records := filepath.Join(volume, "records")
	info, err := os.Stat(records)
	s.check(err)
	if info.Size() == 0 {
		s.Fatal("the workload has written nothing to the volume")
	}
	f, err := os.OpenFile(records, os.O_APPEND|os.O_WRONLY, 0)
	s.check(err)
	_, err = f.WriteString("one more\n")
	s.check(err)
	s.check(f.Close())
	if run, err := s.engine.Restore(s.ctx, c, dir); err == nil {
		s.Errorf("%s was restored, although a file that it holds open has grown", run.ID())
		s.check(s.engine.EndTask(s.ctx, c))
	} else if !strings.Contains(err.Error(), "/data/records") {
		s.Errorf("the refusal does not name /data/records: %v", err)
	} else {
		s.Logf("refused: %v", err)
	}
	if _, err := c.Task(s.ctx, nil); !errdefs.IsNotFound(err) {
		s.Fatalf("a task is left of the refused restore (%v)", err)
	}
	s.step("refused to restore")

	s.check(os.Truncate(records, info.Size()))
	restored := s.restore(c, dir)
	s.checkConsecutive(1, append(before, s.waitNumbers(restored.Output, workload.Rounds, 5)...))
	s.checkOtherVM(first, restored)
}

// exchangeWithdrawn: a container sees the same mounts and files, from its first
// instruction on, as on Kata alone. Kata's Rust shim treats guests differently
// when a container has hooks, as all of nerdctl's have.
func exchangeWithdrawn(s *scenario) {
	args := []string{workload.Path, "first-instruction"}
	hook := []specs.Hook{{Path: "/bin/true", Args: []string{"true"}}}
	kata := *s.engine
	kata.Runtime = s.testbed.Downstream
	kataOptions, err := typeurl.MarshalAny(&runtimeoptions.Options{ConfigPath: s.testbed.KataConfig()})
	s.check(err)
	want := s.visibleFiles(&kata, engine.Container{ID: "kata-alone", Args: args, RuntimeOptions: kataOptions})
	for _, c := range []engine.Container{
		{ID: "without-hooks", Args: args},
		{ID: "with-hooks", Args: args, Hooks: &specs.Hooks{CreateRuntime: hook, Poststop: hook}},
	} {
		have := s.visibleFiles(s.engine, c)
		for _, what := range want {
			if !slices.Contains(have, what) {
				s.Errorf("%s: there is no %s, but with Kata alone there is", c.ID, what)
			}
		}
		for _, what := range have {
			if !slices.Contains(want, what) {
				s.Errorf("%s: there is %s, but not with Kata alone", c.ID, what)
			}
		}
	}
}

// visibleFiles runs first-instruction and lists the mounts and the files in /
// that it saw, and what is in the writable layer afterwards.
func (s *scenario) visibleFiles(e *engine.Engine, c engine.Container) []string {
	s.Helper()
	c.ID, c.Image = s.id(c.ID), parts.WorkloadImageName
	container, err := e.Create(s.ctx, c)
	s.check(err)
	run := s.run(container)
	s.check(run.Output.Wait(s.ctx, func(lines []string) (bool, error) { return slices.Contains(lines, workload.EndLine), nil }))
	var out []string
	for _, line := range run.Output.Lines() {
		word, rest, _ := strings.Cut(line, " ")
		switch word {
		case workload.MountLine:
			// The numbers of mounts are another in every container; where and
			// of what type they are is not.
			before, after, _ := strings.Cut(rest, " - ")
			out = append(out, "mount "+strings.Fields(before)[4]+" of type "+strings.Fields(after)[0])
		case workload.EntryLine:
			out = append(out, "file /"+rest)
		}
	}
	if len(out) < 10 {
		s.Fatalf("%s saw no more than %q", container.ID(), out)
	}
	s.check(s.engine.EndTask(s.ctx, container))
	layer, err := s.engine.Layer(s.ctx, container)
	s.check(err)
	for _, name := range layer {
		out = append(out, "file in the writable layer: "+name)
	}
	s.remove(container)
	return out
}

// checkGuestMounts checks that the guest is what the variant says: the mounts
// of its init are shared, or none is.
func (s *scenario) checkGuestMounts(sandbox string) {
	s.Helper()
	out, _, err := s.testbed.GuestExec(s.ctx, sandbox, "grep -c ' shared:' /proc/1/mountinfo")
	s.check(err)
	shared := strings.TrimSpace(string(out)) != "0"
	if private := strings.HasSuffix(s.Name(), "-"+testbed.Private); shared == private {
		s.Fatalf("in the guest, %s mounts are shared", strings.TrimSpace(string(out)))
	}
}
