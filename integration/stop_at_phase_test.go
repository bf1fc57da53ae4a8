// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// stopTimeout is for an operation to come to a phase.
const stopTimeout = time.Minute

// stopAt has the shim's next operation stop at a phase, such as
// checkpoint-prepare, until it is called off or released.
func (s *scenario) stopAt(phase string) {
	s.Helper()
	path := filepath.Join(s.testbed.StopDir(), phase)
	s.check(os.WriteFile(path, nil, 0o600))
	s.Cleanup(func() {
		for _, left := range []string{path, path + ".reached"} {
			if err := os.Remove(left); err != nil && !os.IsNotExist(err) {
				s.Error(err)
			}
		}
	})
}

// waitStoppedAt waits until the operation has stopped there. One that has
// answered instead fails the scenario.
func (s *scenario) waitStoppedAt(phase string, answer <-chan error) {
	s.Helper()
	if !s.eventually(stopTimeout, func() bool { return len(answer) > 0 || s.isStoppedAt(phase) }) {
		s.Fatalf("%s is not reached", phase)
	}
	if len(answer) > 0 {
		s.Fatalf("%s is not reached; the answer is: %v", phase, <-answer)
	}
	s.step("stopped at %s", phase)
}

// isStoppedAt reports whether an operation is at a phase.
func (s *scenario) isStoppedAt(phase string) bool {
	s.Helper()
	_, err := os.Lstat(filepath.Join(s.testbed.StopDir(), phase+".reached"))
	return err == nil
}

// checkEmpty checks that nothing is below a directory.
func (s *scenario) checkEmpty(dir string) {
	s.Helper()
	s.check(filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if path != dir {
			s.Errorf("%s is left", path)
		}
		return err
	}))
}
