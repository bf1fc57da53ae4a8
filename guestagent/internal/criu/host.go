// SPDX-License-Identifier: Apache-2.0

package criu

import (
	"debug/elf"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Host executes the CRIU of the guest bundle that this binary is in, on a host,
// where CRIU is not copied to [home]: containerd's CRI requires a CRIU on the
// host before it asks any runtime for a checkpoint.
func Host(args []string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	dir := filepath.Join(filepath.Dir(filepath.Dir(self)), "criu")
	lib, program := filepath.Join(dir, "lib"), filepath.Join(dir, "bin", "criu")
	name, err := interpreter(program)
	if err != nil {
		return err
	}
	loader := filepath.Join(lib, filepath.Base(name))
	argv := append([]string{loader, "--library-path", lib, "--argv0", "criu", program}, args[1:]...)
	if err := unix.Exec(loader, argv, os.Environ()); err != nil {
		return fmt.Errorf("start %s: %w", loader, err)
	}
	return nil
}

// interpreter returns the path of the dynamic loader that a program names. It is
// another one on each architecture.
func interpreter(program string) (string, error) {
	f, err := elf.Open(program)
	if err != nil {
		return "", fmt.Errorf("read %s: %w", program, err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		name, err := io.ReadAll(p.Open())
		if err != nil {
			return "", fmt.Errorf("read %s: %w", program, err)
		}
		return strings.TrimRight(string(name), "\x00"), nil
	}
	return "", fmt.Errorf("%s names no dynamic loader", program)
}
