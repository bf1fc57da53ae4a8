// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/kata-checkpoint/kata-checkpoint/integration/parts"
	"github.com/kata-checkpoint/kata-checkpoint/integration/workload"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
)

// refusedGuestBundle: what is installed for the guest is not what the shim
// needs, and the refusal says what is wrong with it. A container that was
// started without a need of what is missing keeps running.
func refusedGuestBundle(s *scenario) {
	bundle := s.guestBundle()

	// An agent built from the sources as they are, but for the version of the
	// protocol.
	other := s.buildOtherAgent()
	for _, name := range []string{"bin/kata-checkpoint-agent", "hooks/prestart/kata-checkpoint-agent-hook"} {
		s.check(bundle.replace(name, func(to string) error { return parts.CopyFile(other, to) }))
	}
	c := s.create(counter("other-protocol"))
	if _, err := s.engine.Start(s.ctx, c); err == nil {
		s.Error("an agent of another protocol version is accepted")
	} else {
		s.Logf("an agent of another protocol version: %v", err)
		for _, word := range []string{"version other with protocol", fmt.Sprint("with protocol ", api.ProtocolVersion), fmt.Sprint("with protocol ", api.ProtocolVersion+1), "same release"} {
			if !strings.Contains(err.Error(), word) {
				s.Errorf("the refusal does not say %q: %v", word, err)
			}
		}
	}
	s.remove(c)
	s.check(bundle.putBack())
	s.step("an agent of another protocol version")

	// No CRIU.
	s.check(bundle.replace("criu", func(string) error { return nil }))
	pod := s.startPod()
	run := s.run(pod.create(counter("c")))
	s.waitNumbers(run.Output, workload.Ticks, 3)
	s.checkRefused("no CRIU", run, s.newDir(), "no CRIU", "install the whole guest bundle")
	s.checkKeepsRunning(run)

	// A program in CRIU's place that answers as one does which is too old, or
	// which finds that the kernel lacks what it needs. The agent asks its CRIU
	// once: it is ended, and another one comes in its place.
	for name, tc := range map[string]struct {
		answers map[string]any
		words   []string
	}{
		"an old CRIU": {map[string]any{"major": 3, "minor": 17}, []string{"CRIU 3.17", "too old", "guest bundle with 4.0 or newer"}},
		"a CRIU that finds the kernel unfit": {
			map[string]any{"major": 4, "minor": 2, "check": "Error: this kernel has no map_files"},
			[]string{"no map_files", "options of configs/kernel"},
		},
	} {
		s.check(bundle.putBack())
		s.check(bundle.replace("criu", func(to string) error { return makeCRIU(to, tc.answers) }))
		s.restartAgent(pod)
		s.checkRefused(name, run, s.newDir(), tc.words...)
		s.checkKeepsRunning(run)
	}

	s.check(bundle.putBack())
	s.restartAgent(pod)
	s.check(s.engine.CheckpointTo(s.ctx, run, s.newDir(), false))
	s.checkKeepsRunning(run)
	s.step("whole again")
}

// installedBundle is the guest bundle of a testbed, on the host: guests see it
// as it is.
type installedBundle struct {
	dir, aside string
	replaced   []string
}

// guestBundle gives the testbed's bundle, which is put back as it was at the
// scenario's end.
func (s *scenario) guestBundle() *installedBundle {
	s.Helper()
	aside, err := os.MkdirTemp(filepath.Join(s.testbed.Dir, "tmp"), "bundle-")
	s.check(err)
	b := &installedBundle{dir: filepath.Join(s.testbed.Dir, "bundle"), aside: aside}
	s.Cleanup(func() {
		if err := b.putBack(); err != nil {
			s.Error(err)
		}
		if err := os.Remove(aside); err != nil {
			s.Error(err)
		}
	})
	return b
}

// replace moves a file or directory of the bundle away and has another made in
// its place.
func (b *installedBundle) replace(name string, put func(to string) error) error {
	at := filepath.Join(b.dir, name)
	if err := os.Rename(at, filepath.Join(b.aside, fmt.Sprint(len(b.replaced)))); err != nil {
		return err
	}
	b.replaced = append(b.replaced, name)
	return put(at)
}

// putBack undoes what replace did.
func (b *installedBundle) putBack() error {
	for i, name := range b.replaced {
		at := filepath.Join(b.dir, name)
		if err := os.RemoveAll(at); err != nil {
			return err
		}
		if err := os.Rename(filepath.Join(b.aside, fmt.Sprint(i)), at); err != nil {
			return err
		}
	}
	b.replaced = nil
	return nil
}

// makeCRIU puts the program into the directory of a bundle's CRIU, with its
// answers.
func makeCRIU(dir string, answers map[string]any) error {
	p, err := parts.Find()
	if err != nil {
		return err
	}
	data, err := json.Marshal(answers)
	if err != nil {
		return err
	}
	bin := filepath.Join(dir, "bin")
	if err := os.MkdirAll(bin, 0o755); err != nil {
		return err
	}
	if err := parts.CopyFile(p.Bin("testbed-criu"), filepath.Join(bin, "criu")); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(bin, "answers.json"), data, 0o644)
}

// buildOtherAgent builds the agent of a release that speaks the next version of
// the protocol, and no longer this one.
func (s *scenario) buildOtherAgent() string {
	s.Helper()
	const file = "../internal/api/api.go"
	source, err := os.ReadFile(file)
	s.check(err)
	text := string(source)
	for name, value := range map[string]int{"ProtocolVersion": api.ProtocolVersion, "OldestProtocol": api.OldestProtocol} {
		before := fmt.Sprint(name, " = ", value)
		if strings.Count(text, before) != 1 {
			s.Fatalf("%s does not say %q", file, before)
		}
		text = strings.Replace(text, before, fmt.Sprint(name, " = ", api.ProtocolVersion+1), 1)
	}
	dir := s.newDir()
	changed := filepath.Join(dir, "api.go")
	s.check(os.WriteFile(changed, []byte(text), 0o644))
	absolute, err := filepath.Abs(file)
	s.check(err)
	overlay, err := json.Marshal(map[string]any{"Replace": map[string]string{absolute: changed}})
	s.check(err)
	s.check(os.WriteFile(filepath.Join(dir, "overlay.json"), overlay, 0o644))
	out := filepath.Join(dir, "agent")
	cmd := exec.CommandContext(s.ctx, "go", "build", "-trimpath", "-buildvcs=false", "-overlay", filepath.Join(dir, "overlay.json"),
		"-ldflags", "-s -w -X github.com/kata-checkpoint/kata-checkpoint/internal/version.Version=other", "-o", out, "./cmd/kata-checkpoint-agent")
	cmd.Dir = ".." // the product's module
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		s.Fatalf("build the other agent: %v\n%s", err, text)
	}
	s.step("built an agent of another protocol version")
	return out
}

// restartAgent ends the agent in a pod's guest, once the guest sees the bundle
// as it now is on the host. The shim starts a new one when it next needs one.
func (s *scenario) restartAgent(p *pod) {
	s.Helper()
	criu, err := os.ReadFile(filepath.Join(s.testbed.Dir, "bundle/criu/bin/criu"))
	s.check(err)
	sum := fmt.Sprintf("%x", sha256.Sum256(criu))
	s.shellInGuest(p, `
		cd /run/kata-containers/shared/containers/sandbox-mounts/bundle 2>/dev/null || cd /run/kata-containers/shared/containers/passthrough/sandbox-mounts/bundle
		until sha256sum criu/bin/criu | grep -q `+sum+`; do sleep 0.1; done`)
	s.killAgent(p)
}
