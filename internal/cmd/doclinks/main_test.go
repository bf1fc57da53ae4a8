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
	write("docs/other.md", "# Title\n\n## What is refused, and when\n")
	for name, tc := range map[string]struct{ text, want string }{
		"a file that exists":     {text: "[x](docs/other.md)"},
		"a directory":            {text: "[x](docs)"},
		"a heading that exists":  {text: "[x](docs/other.md#what-is-refused-and-when)"},
		"a heading of its own":   {text: "# Here\n[x](#here)"},
		"another site":           {text: "[x](https://example.com/nothing)"},
		"a file that is missing": {text: "[x](docs/gone.md)", want: `"docs/gone.md" leads to no file`},
		"a heading that is not":  {text: "[x](docs/other.md#nothing)", want: `"docs/other.md#nothing" leads to no heading`},
		"two in a line":          {text: "[x](docs/other.md) [y](z.md)", want: `"z.md" leads to no file`},
	} {
		t.Run(name, func(t *testing.T) {
			problems, err := check(write("page.md", tc.text))
			if err != nil {
				t.Fatal(err)
			}
			if got := strings.Join(problems, "\n"); (tc.want == "") != (got == "") || !strings.Contains(got, tc.want) {
				t.Errorf("got %q, want %q", got, tc.want)
			}
		})
	}
}
