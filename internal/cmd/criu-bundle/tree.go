// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"debug/elf"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/kata-checkpoint/kata-checkpoint/internal/debian"
)

// tree is a root directory with packages unpacked into it. It knows which
// package each file came from: that decides whose licences the bundle carries.
type tree struct {
	dir   string
	owner map[string]debian.Package // by the path below dir
}

func (t *tree) add(ctx context.Context, p debian.Package) error {
	if err := p.Unpack(ctx, t.dir); err != nil {
		return err
	}
	files, err := p.Files(ctx)
	if err != nil {
		return err
	}
	for _, file := range files {
		t.owner[file] = p
	}
	return nil
}

// resolve follows the symbolic links of a path below the tree's root.
func (t *tree) resolve(path string) (string, error) {
	root, err := filepath.EvalSymlinks(t.dir)
	if err != nil {
		return "", err
	}
	target, err := filepath.EvalSymlinks(filepath.Join(root, path))
	if err != nil {
		return "", err
	}
	below, err := filepath.Rel(root, target)
	if err != nil || !filepath.IsLocal(below) {
		return "", fmt.Errorf("%s leads out of the packages, to %s", path, target)
	}
	return below, nil
}

// library finds the shared library that a program asks for by name.
func (t *tree) library(name string) (string, error) {
	found, err := filepath.Glob(filepath.Join(t.dir, "usr/lib/*-linux-gnu", name))
	if err != nil {
		return "", err
	}
	if len(found) != 1 {
		return "", fmt.Errorf("library %s is in the packages %d times", name, len(found))
	}
	path, err := filepath.Rel(t.dir, found[0])
	if err != nil {
		return "", err
	}
	return t.resolve(path)
}

// closure is every library that the programs need, by the name they ask for,
// as paths below the tree's root. That is what ldd prints, found without
// running anything: these programs are made for a newer C library than ours.
func (t *tree) closure(programs map[string]string) (map[string]string, error) {
	libraries := map[string]string{}
	var visit func(path string) error
	visit = func(path string) error {
		needed, err := neededBy(filepath.Join(t.dir, path))
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		for _, name := range needed {
			if _, done := libraries[name]; done {
				continue
			}
			library, err := t.library(name)
			if err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
			libraries[name] = library
			if err := visit(library); err != nil {
				return err
			}
		}
		return nil
	}
	for path := range programs {
		if err := visit(path); err != nil {
			return nil, err
		}
	}
	return libraries, nil
}

// neededBy lists the libraries that an ELF file names, the interpreter among
// them. A run path of its own would lead it past the folder: refuse it.
func neededBy(path string) ([]string, error) {
	file, err := elf.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	for _, tag := range []elf.DynTag{elf.DT_RPATH, elf.DT_RUNPATH} {
		if paths, err := file.DynString(tag); err == nil && len(paths) > 0 {
			return nil, fmt.Errorf("has a run path of its own: %s", strings.Join(paths, ":"))
		}
	}
	needed, err := file.ImportedLibraries()
	if err != nil {
		return nil, err
	}
	interpreter, err := interpreterOf(file)
	if err != nil {
		return nil, err
	}
	if interpreter != "" {
		needed = append(needed, filepath.Base(interpreter))
	}
	return needed, nil
}

func interpreterOf(file *elf.File) (string, error) {
	for _, header := range file.Progs {
		if header.Type == elf.PT_INTERP {
			path := make([]byte, header.Filesz)
			if _, err := header.ReadAt(path, 0); err != nil {
				return "", fmt.Errorf("read the interpreter's path: %w", err)
			}
			return strings.TrimRight(string(path), "\x00"), nil
		}
	}
	return "", nil
}
