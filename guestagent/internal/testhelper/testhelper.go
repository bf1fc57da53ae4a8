// SPDX-License-Identifier: Apache-2.0

// Package testhelper builds the guest's C program for tests.
package testhelper

import (
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"
)

// Build builds kata-checkpoint-helper as the Makefile does and returns its path.
func Build(t *testing.T) string {
	t.Helper()
	_, here, _, ok := runtime.Caller(0)
	if !ok {
		t.Fatal("no path to the source")
	}
	source := filepath.Join(filepath.Dir(here), "../../helper/helper.c")
	program := filepath.Join(t.TempDir(), "kata-checkpoint-helper")
	if out, err := exec.Command("cc", "-static", "-O2", "-Wall", "-Wextra", "-Werror", "-o", program, source).CombinedOutput(); err != nil {
		t.Fatalf("build the helper: %v: %s", err, out)
	}
	return program
}
