// SPDX-License-Identifier: Apache-2.0

// Command notice writes NOTICE: the third-party software in the binaries and
// the guest bundle that operators install, and its licences. It runs in the
// module's root, after the guest bundle's CRIU has been built.
package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// Both are relative to the module's root.
const (
	noticeFile     = "NOTICE"
	bundleManifest = "build/criu/MANIFEST"
)

func main() {
	if err := write(); err != nil {
		fmt.Fprintln(os.Stderr, "notice:", err)
		os.Exit(1)
	}
}

func write() error {
	text, err := notice(".")
	if err != nil {
		return err
	}
	return os.WriteFile(noticeFile, text, 0o644)
}

// notice returns the content of NOTICE for the module in a directory.
func notice(root string) ([]byte, error) {
	modules, err := moduleList(root)
	if err != nil {
		return nil, err
	}
	packages, err := packageList(root)
	if err != nil {
		return nil, err
	}
	return fmt.Appendf(nil, `kata-checkpoint
Copyright The kata-checkpoint Authors. Licensed under the Apache License 2.0: see LICENSE.

Its binaries contain the Go standard library (BSD-3-Clause, Copyright The Go Authors) and these Go modules, whose
versions are in go.mod and whose licences are in the guest bundle's folder licenses/:

%s
The guest bundle's kata-checkpoint-helper is linked statically to the GNU C Library (LGPL-2.1-or-later), whose licence is
in the bundle's folder licenses/libc6; with this project's sources it can be linked to another version: see the Makefile.

The guest bundle contains programs and libraries of these Debian packages, unchanged but for the place where CRIU, tar
and gzip look for their libraries. The bundle's MANIFEST has their versions and its folder licenses/ their copyright
files. Their sources are Debian's source packages of the same versions, which Debian's archive and its snapshots keep.

%s`, modules, packages), nil
}

// moduleList has a line for each Go module in the shipped binaries.
func moduleList(root string) (string, error) {
	modules, err := linkedModules(root)
	if err != nil {
		return "", err
	}
	var lines strings.Builder
	for _, m := range modules {
		licence, err := licenceOf(m.dir)
		if err != nil {
			return "", fmt.Errorf("%s: %w", m.path, err)
		}
		fmt.Fprintf(&lines, "  %-52s %s\n", m.path, licence)
	}
	return lines.String(), nil
}

type module struct{ path, dir string }

// linkedModules are the modules that a package of the shipped commands is from.
func linkedModules(root string) ([]module, error) {
	list := exec.Command("go", "list", "-deps", "-f", "{{with .Module}}{{if not .Main}}{{.Path}} {{.Dir}}{{end}}{{end}}", "./cmd/...")
	list.Dir = root
	// As the binaries are built: cgo and other systems bring other packages.
	list.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux")
	var stderr bytes.Buffer
	list.Stderr = &stderr
	out, err := list.Output()
	if err != nil {
		return nil, fmt.Errorf("list the modules: %w: %s", err, bytes.TrimSpace(stderr.Bytes()))
	}
	var modules []module
	for lines := bufio.NewScanner(bytes.NewReader(out)); lines.Scan(); {
		if path, dir, found := strings.Cut(lines.Text(), " "); found {
			modules = append(modules, module{path, dir})
		}
	}
	slices.SortFunc(modules, func(a, b module) int { return strings.Compare(a.path, b.path) })
	return slices.Compact(modules), nil
}

// licences are known by a sentence that only they have, the more particular
// before the more general.
var licences = []struct{ id, sentence string }{
	{"Apache-2.0", "Apache License"},
	{"MPL-2.0", "Mozilla Public License"},
	{"ISC", "Permission to use, copy, modify, and/or distribute this software"},
	{"MIT", "Permission is hereby granted, free of charge"},
	{"BSD-3-Clause", "Neither the name"},
	{"BSD-3-Clause", "The names of its contributors may not be used"},
	{"CC0-1.0", "CC0 1.0 Universal"},
	{"Unlicense", "free and unencumbered software released into the public domain"},
	{"BSD-2-Clause", "Redistributions in binary form must reproduce"},
}

var errNoLicence = errors.New("no licence that is known here")

// licenceOf reads a module's licence files. A module may have several.
func licenceOf(dir string) (string, error) {
	var found []string
	for _, pattern := range []string{"LICEN[CS]E*", "UNLICENSE*", "COPYING*"} {
		files, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil {
			return "", err
		}
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err != nil {
				return "", err
			}
			if id := identify(string(text)); id != "" && !slices.Contains(found, id) {
				found = append(found, id)
			}
		}
	}
	if len(found) == 0 {
		return "", errNoLicence
	}
	return strings.Join(found, " and "), nil
}

func identify(text string) string {
	text = strings.Join(strings.Fields(text), " ")
	for _, licence := range licences {
		if strings.Contains(text, licence.sentence) {
			return licence.id
		}
	}
	return ""
}

// packageList has a line for each Debian package in the guest bundle.
func packageList(root string) (string, error) {
	manifest, err := os.ReadFile(filepath.Join(root, bundleManifest))
	if err != nil {
		return "", fmt.Errorf("the guest bundle's packages (make guest-bundle): %w", err)
	}
	var list strings.Builder
	for line := range strings.Lines(string(manifest)) {
		if name, _, found := strings.Cut(line, " "); found && name != "#" {
			fmt.Fprintf(&list, "  %s\n", name)
		}
	}
	return list.String(), nil
}
