// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	cdx "github.com/CycloneDX/cyclonedx-go"
)

func TestSBOM(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "bin"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := write(&bytes.Buffer{}, "1", dir, os.DevNull); err == nil {
		t.Error("a release without binaries is accepted")
	}
	self, err := os.Executable() // a Go binary with dependencies
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(self, filepath.Join(dir, "bin/program")); err != nil {
		t.Fatal(err)
	}
	manifest := filepath.Join(dir, "MANIFEST")
	if err := os.WriteFile(manifest, []byte("# Debian forky\ncriu 4.2.1-1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := write(&out, "1.2.3", dir, manifest); err != nil {
		t.Fatal(err)
	}
	var bom cdx.BOM
	if err := cdx.NewBOMDecoder(&out, cdx.BOMFileFormatJSON).Decode(&bom); err != nil {
		t.Fatal(err)
	}
	have := map[string]string{}
	for _, c := range *bom.Components {
		have[c.Name] = c.PackageURL
	}
	if bom.Metadata.Component.Version != "1.2.3" || have["criu"] != "pkg:deb/debian/criu@4.2.1-1" || have["std"] == "" {
		t.Errorf("got %v", have)
	}
}
