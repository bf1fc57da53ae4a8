// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/kata-checkpoint/kata-checkpoint/integration/engine"
	"github.com/kata-checkpoint/kata-checkpoint/integration/parts"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
)

// finding is a line of `kata-checkpoint check`.
type finding struct{ Check, Level, Text, Cure, Code string }

// checkCommand runs `kata-checkpoint check`, and returns its findings and exit
// status.
func (s *scenario) checkCommand(args ...string) ([]finding, int) {
	s.Helper()
	p, err := parts.Find()
	s.check(err)
	cmd := exec.CommandContext(s.ctx, p.Bin("kata-checkpoint"), append([]string{"check", "--json", "--address", s.testbed.Address, "--config", s.testbed.OwnConfig()}, args...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		s.Fatal(err)
	}
	var findings []finding
	if err := json.Unmarshal(out, &findings); err != nil {
		s.Fatalf("check %v: %v: %s", args, err, stderr.String())
	}
	return findings, cmd.ProcessState.ExitCode()
}

// checkContainer: `kata-checkpoint check CONTAINER` reports whether a container
// can be checkpointed, in the words of the refusal if it cannot, and freezes
// nothing.
func checkContainer(s *scenario) {
	good := s.run(s.create(counter("good")))
	s.waitNumbers(good.Output, workload.Ticks, 2)
	findings, status := s.checkCommand(good.ID())
	if i := slices.IndexFunc(findings, func(f finding) bool { return f.Check == "container.size" }); status != 0 || i < 0 {
		s.Errorf("status %d, %v", status, findings)
	}
	s.checkKeepsRunning(good)
	s.check(good.Pause(s.ctx))
	if findings, status = s.checkCommand(good.ID()); status != 1 || !slices.ContainsFunc(findings, func(f finding) bool { return f.Level == "warning" && f.Check == "container.checkpoint" }) {
		s.Errorf("paused: status %d, %v", status, findings)
	}
	s.check(good.Resume(s.ctx))

	w := s.connectedLink(linkPath())
	peer := s.answering(w)
	bad := s.run(s.create(engine.Container{ID: "bad", Args: []string{workload.Path, "caller", "-server", peer.Addr().String()}, Network: w.namespace.Path}))
	s.waitNumbers(bad.Output, workload.Rounds, 2)
	const sentence = "has an open TCP connection from"
	findings, status = s.checkCommand(bad.ID())
	if status != 2 || !slices.ContainsFunc(findings, func(f finding) bool { return f.Level == "error" && strings.Contains(f.Text, sentence) }) {
		s.Errorf("with a connection: status %d, %v", status, findings)
	}
	s.checkRefused("an open connection", bad, s.newDir(), sentence)
}

// checkGood: `kata-checkpoint check --guest` finds nothing amiss on a node on
// which everything works, except for its guest kernel if it is a distribution's.
func checkGood(s *scenario) {
	findings, status := s.checkCommand("--guest")
	if status > 1 {
		s.Errorf("check ends with %d, want a warning at most", status)
	}
	var checks []string
	for _, f := range findings {
		checks = append(checks, f.Check)
		if f.Level != "ok" && (f.Check != "kata.kernel" || parts.OwnKernel()) {
			s.Errorf("%s %s: %s (%s)", f.Level, f.Check, f.Text, f.Cure)
		}
	}
	for _, want := range []string{
		"containerd.version", "runtime.shim", "runtime.handler", "nri.containerd", "nri.plugin", "kata.shim", "kata.config",
		"kata.shared_fs", "kata.sandbox_bind_mounts", "kata.guest_hook_path", "kata.kernel", "bundle", "criu", "state_dir.space",
		"guest.start", "guest.agent", "guest.virtiofs", "guest.kernel", "guest.criu", "guest.checkpoint",
	} {
		if !slices.Contains(checks, want) {
			s.Errorf("nothing is said about %s, only about %v", want, checks)
		}
	}
	s.step("checked")
}

// checkEachFault: `kata-checkpoint check --guest` finds what is wrong in a guest,
// under the name of the finding, with a cure and a code, and leaves nothing. The
// tests of package check provoke every finding.
func checkEachFault(s *scenario) {
	bundle := s.guestBundle()
	expect := func(what, check string, words ...string) {
		s.Helper()
		findings, status := s.checkCommand("--guest")
		i := slices.IndexFunc(findings, func(f finding) bool { return f.Check == check && f.Level == "error" })
		if status != 2 || i < 0 || findings[i].Cure == "" || findings[i].Code == "" {
			s.Errorf("%s: status %d, %+v", what, status, findings)
			return
		}
		for _, w := range words {
			if !strings.Contains(findings[i].Text, w) {
				s.Errorf("%s: the finding says nothing of %q: %s", what, w, findings[i].Text)
			}
		}
		s.Logf("%s: %s", what, findings[i].Text)
		s.step("%s", what)
	}
	s.check(bundle.replace("criu", func(string) error { return nil }))
	expect("no CRIU", "guest.criu", "no CRIU")
	s.check(bundle.putBack())
	s.check(bundle.replace("criu", func(to string) error {
		return makeCRIU(to, map[string]any{"major": 4, "minor": 2, "check": "Error: this kernel has no map_files"})
	}))
	expect("a kernel that CRIU does not take", "guest.criu", "no map_files")
	s.check(bundle.putBack())

	state, err := os.MkdirTemp("/var/tmp", "kata-checkpoint-state-")
	s.check(err)
	s.check(syscall.Mount("tmpfs", state, "tmpfs", 0, "size=1m"))
	s.afterContainers(func() error { return errors.Join(syscall.Unmount(state, 0), os.Remove(state)) })
	s.configure("state_dir", state)
	expect("no room", "guest.checkpoint", "no space left")
	s.configure("state_dir", filepath.Join(s.testbed.Dir, "state"))
	s.configure("agent_port", 10749)
	s.configure("agent_timeout", "1s")
	expect("no agent", "guest.start", "agent")
}
