// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"debug/elf"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/kata-checkpoint/kata-checkpoint/internal/debian"
)

// copyPrograms writes the programs and their libraries into out and returns
// the packages that they are from.
func copyPrograms(ctx context.Context, source *tree, out string) ([]debian.Package, error) {
	libraries, err := source.closure(programs)
	if err != nil {
		return nil, err
	}
	files := map[string]string{} // from the source, to out
	for path := range programs {
		files[path] = filepath.Join("bin", filepath.Base(path))
	}
	for name, path := range libraries {
		files[path] = filepath.Join("lib", name)
	}
	used := map[string]debian.Package{}
	for from, to := range files {
		owner, known := source.owner[from]
		if !known {
			return nil, fmt.Errorf("%s is from no package", from)
		}
		used[owner.Name] = owner
		if err := copyFile(filepath.Join(source.dir, from), filepath.Join(out, to), 0o755); err != nil {
			return nil, err
		}
	}
	for path := range programs {
		if err := relocate(ctx, filepath.Join(out, "bin", filepath.Base(path))); err != nil {
			return nil, err
		}
	}
	return slices.SortedFunc(maps.Values(used), func(a, b debian.Package) int { return strings.Compare(a.Name, b.Name) }), nil
}

// relocate points a program to the folder's own dynamic linker and libraries.
// The run path has to be a DT_RPATH: unlike a DT_RUNPATH it holds for what the
// libraries need in turn, so that the libraries stay as Debian built them.
func relocate(ctx context.Context, program string) error {
	file, err := elf.Open(program)
	if err != nil {
		return err
	}
	defer file.Close()
	interpreter, err := interpreterOf(file)
	if err != nil {
		return err
	}
	patchelf := exec.CommandContext(ctx, "patchelf",
		"--set-interpreter", filepath.Join(guestHome, "lib", filepath.Base(interpreter)),
		"--force-rpath", "--set-rpath", "$ORIGIN/../lib", program)
	if out, err := patchelf.CombinedOutput(); err != nil {
		return fmt.Errorf("patchelf %s: %w: %s", program, err, out)
	}
	return nil
}

// describe writes the licences of the packages and their list.
func describe(source *tree, used []debian.Package, out string) error {
	var manifest strings.Builder
	fmt.Fprintf(&manifest, "# Debian %s: the binary packages whose files are in criu/, and their versions\n", suite)
	for _, p := range used {
		fmt.Fprintln(&manifest, p.Name, p.Version)
		copyright, err := source.resolve(filepath.Join("usr/share/doc", p.Name, "copyright"))
		if err != nil {
			return fmt.Errorf("licence of %s: %w", p.Name, err)
		}
		if err := copyFile(filepath.Join(source.dir, copyright), filepath.Join(out, "licenses", p.Name, "copyright"), 0o644); err != nil {
			return err
		}
	}
	texts := filepath.Join(source.dir, "usr/share/common-licenses")
	entries, err := os.ReadDir(texts)
	if err != nil {
		return fmt.Errorf("licence texts: %w", err)
	}
	for _, entry := range entries {
		if err := copyFile(filepath.Join(texts, entry.Name()), filepath.Join(out, "licenses", "common-licenses", entry.Name()), 0o644); err != nil {
			return err
		}
	}
	return os.WriteFile(filepath.Join(out, "MANIFEST"), []byte(manifest.String()), 0o644)
}

// copyFile copies what a path leads to: the bundle has regular files only.
func copyFile(from, to string, mode os.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, mode)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		out.Close()
		return fmt.Errorf("copy %s: %w", from, err)
	}
	return out.Close()
}
