// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestCheck(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	write("parser/parser_test.go", "package parser\n\nfunc TestParser(t *testing.T) {}\nfunc FuzzParser(f *testing.F) {}\n")
	write("e2e/scenarios_test.go", "package e2e\n\nvar list = []c{\n\t{name: \"counts-on\", kind: kindBasics},\n\t{name: \"cases\", kind: kindCases},\n}\n")
	write("build/gone_test.go", "func TestBuilt(t *testing.T) {}\n")
	all, err := readTests(dir)
	if err != nil {
		t.Fatal(err)
	}
	write("docs/other.md", "# Title\n\n## What is refused, and when\n")
	for name, tc := range map[string]struct{ text, want string }{
		"a file that exists":     {text: "[x](docs/other.md)"},
		"a directory":            {text: "[x](docs)"},
		"a heading that exists":  {text: "[x](docs/other.md#what-is-refused-and-when)"},
		"a heading of its own":   {text: "# Here\n[x](#here)"},
		"another site":           {text: "[x](https://example.com/nothing)"},
		"a file that is missing": {text: "[x](docs/gone.md)", want: `"docs/gone.md" leads to no file`},
		"a heading that is not":  {text: "[x](docs/other.md#nothing)", want: `"docs/other.md#nothing" leads to no heading`},
		"tests that exist":       {text: "(`TestParser`, `FuzzParser` of package parser; scenario `counts-on`)"},
		"a test that does not":   {text: "as TestBuilt shows", want: "there is no TestBuilt"},
		"of another package":     {text: "(`FuzzParser`, `TestParser` of package reader)", want: "TestParser is in package parser, not reader"},
		"scenarios":              {text: "Scenarios `cases`, `counts-on` and `cases`; scenario counts-on; a scenario of a kind"},
		"no such scenario":       {text: "the scenarios `cases` and `gone`", want: "there is no scenario gone"},
		"none in plain text":     {text: "(Scenario counts-off.)", want: "there is no scenario counts-off"},
		"two in a line":          {text: "[x](docs/other.md) [y](z.md)", want: `"z.md" leads to no file`},
	} {
		t.Run(name, func(t *testing.T) {
			problems, err := check(write("page.md", tc.text), all)
			if err != nil {
				t.Fatal(err)
			}
			if got := strings.Join(problems, "\n"); (tc.want == "") != (got == "") || !strings.Contains(got, tc.want) {
				t.Errorf("got %q, want %q", got, tc.want)
			}
		})
	}
}
