// SPDX-License-Identifier: Apache-2.0

package criu

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// IsOp reports whether a path is that of an operation's launcher.
func IsOp(path string) bool {
	_, err := os.Lstat(filepath.Join(filepath.Dir(path), jobName))
	return err == nil
}

// Host executes the CRIU of the guest bundle that this binary is in, on a host,
// where CRIU is not copied to [home]: containerd's CRI requires a CRIU on the
// host before it asks any runtime for a checkpoint.
func Host(args []string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	dir := filepath.Join(filepath.Dir(filepath.Dir(self)), "criu")
	lib := filepath.Join(dir, "lib")
	loader := filepath.Join(lib, "ld-linux-x86-64.so.2")
	argv := append([]string{loader, "--library-path", lib, "--argv0", "criu", filepath.Join(dir, "bin", "criu")}, args[1:]...)
	if err := unix.Exec(loader, argv, os.Environ()); err != nil {
		return fmt.Errorf("start %s: %w", loader, err)
	}
	return nil
}
