// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"bytes"
	"encoding/json"
	"errors"
	"os/exec"
	"slices"

	"github.com/kata-checkpoint/kata-checkpoint/integration/parts"
)

// checkGood: `kata-checkpoint check` finds nothing amiss on a node on which
// everything works, except for its guest kernel, a distribution's.
func checkGood(s *scenario) {
	p, err := parts.Find()
	s.check(err)
	cmd := exec.CommandContext(s.ctx, p.Bin("kata-checkpoint"), "check", "--json", "--address", s.testbed.Address, "--config", s.testbed.OwnConfig())
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	var exit *exec.ExitError
	if err != nil && (!errors.As(err, &exit) || exit.ExitCode() != 1) {
		s.Errorf("check ends with %v, want a warning at most: %s", err, stderr.String())
	}
	var findings []struct{ Check, Level, Text, Cure string }
	s.check(json.Unmarshal(out, &findings))
	var checks []string
	for _, f := range findings {
		checks = append(checks, f.Check)
		if f.Level != "ok" && f.Check != "kata.kernel" {
			s.Errorf("%s %s: %s (%s)", f.Level, f.Check, f.Text, f.Cure)
		}
	}
	for _, want := range []string{
		"containerd.version", "runtime.shim", "runtime.handler", "nri.containerd", "nri.plugin", "kata.shim", "kata.config",
		"kata.shared_fs", "kata.sandbox_bind_mounts", "kata.guest_hook_path", "kata.kernel", "bundle", "criu", "state_dir.space",
	} {
		if !slices.Contains(checks, want) {
			s.Errorf("nothing is said about %s, only about %v", want, checks)
		}
	}
	s.step("checked")
}
