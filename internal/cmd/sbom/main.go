// SPDX-License-Identifier: Apache-2.0

// Command sbom writes what is in a release, as CycloneDX:
//
//	sbom VERSION RELEASE MANIFEST
//
// The Go modules are those that the binaries in RELEASE/bin name themselves, the
// Debian packages those of the guest bundle's MANIFEST.
package main

import (
	"bufio"
	"debug/buildinfo"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	cdx "github.com/CycloneDX/cyclonedx-go"
)

func main() {
	if len(os.Args) != 4 {
		fmt.Fprintln(os.Stderr, "usage: sbom VERSION RELEASE MANIFEST")
		os.Exit(2)
	}
	if err := write(os.Stdout, os.Args[1], os.Args[2], os.Args[3]); err != nil {
		fmt.Fprintln(os.Stderr, "sbom:", err)
		os.Exit(1)
	}
}

func write(w io.Writer, version, release, manifest string) error {
	components := map[string]cdx.Component{}
	if err := modules(components, filepath.Join(release, "bin")); err != nil {
		return err
	}
	if err := packages(components, manifest); err != nil {
		return err
	}
	list := []cdx.Component{}
	for _, purl := range slices.Sorted(maps.Keys(components)) {
		list = append(list, components[purl])
	}
	bom := cdx.NewBOM()
	bom.Metadata = &cdx.Metadata{Component: &cdx.Component{
		Type: cdx.ComponentTypeApplication, Name: "kata-checkpoint", Version: version, BOMRef: "kata-checkpoint",
		Licenses: &cdx.Licenses{{License: &cdx.License{ID: "Apache-2.0"}}},
	}}
	bom.Components = &list
	return cdx.NewBOMEncoder(w, cdx.BOMFileFormatJSON).SetPretty(true).Encode(bom)
}

func add(components map[string]cdx.Component, purl, name, version string) {
	components[purl] = cdx.Component{Type: cdx.ComponentTypeLibrary, BOMRef: purl, PackageURL: purl, Name: name, Version: version}
}

// modules adds the Go modules of the binaries in a directory, and Go itself.
func modules(components map[string]cdx.Component, dir string) error {
	files, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	found := false
	for _, f := range files {
		info, err := buildinfo.ReadFile(filepath.Join(dir, f.Name()))
		if err != nil {
			continue // the helper, which is a C program
		}
		found = true
		goVersion := strings.TrimPrefix(info.GoVersion, "go")
		add(components, "pkg:golang/std@"+goVersion, "std", goVersion)
		for _, m := range info.Deps {
			if m.Replace != nil {
				m = m.Replace
			}
			add(components, "pkg:golang/"+m.Path+"@"+m.Version, m.Path, m.Version)
		}
	}
	if !found {
		return fmt.Errorf("%s has no Go binaries", dir)
	}
	return nil
}

// packages adds the Debian packages of a manifest: a line each, name and version.
func packages(components map[string]cdx.Component, manifest string) error {
	file, err := os.Open(manifest)
	if err != nil {
		return err
	}
	defer file.Close()
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		name, version, ok := strings.Cut(lines.Text(), " ")
		if !ok || strings.HasPrefix(name, "#") {
			continue
		}
		add(components, "pkg:deb/debian/"+name+"@"+version, name, version)
	}
	return lines.Err()
}
