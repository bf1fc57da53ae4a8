// SPDX-License-Identifier: Apache-2.0

package criu

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"
)

func TestLaunchDeclinesAPidThatIsTaken(t *testing.T) {
	dir := t.TempDir()
	data, err := json.Marshal(Job{Avoid: []int{1, os.Getpid()}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, jobName), data, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Launch([]string{filepath.Join(dir, launcherName), "swrk", "3"}); !errors.Is(err, errPIDTaken) {
		t.Fatalf("error %v", err)
	}
	if said, err := os.ReadFile(filepath.Join(dir, launchErrorName)); err != nil || string(said) != errPIDTaken.Error() {
		t.Errorf("it leaves %q (%v)", said, err)
	}
}
