// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const page = "# Glossary\n\n| `not` | this |\n\n" + heading + `

| Not | But |
|---|---|
| ` + "`goes on`, `go on`" + ` | keeps running, continues |
| ` + "`ways in`" + ` | attack surface |
| ` + "`Kata's word`" + ` | cached state |

## Another section

| ` + "`not`" + ` | this either |
`

func TestFindings(t *testing.T) {
	for name, tc := range map[string]struct {
		file, content string
		want          []string
	}{
		"a text":                          {"a.md", "It goes on.\nThen it\nstops.\n", []string{`1: "goes on" is retired; the glossary has "keeps running, continues"`}},
		"at the beginning of a sentence":  {"a.md", "\nWays in: none.", []string{`2: "ways in"`}},
		"across lines":                    {"a.md", "one\nit goes\n  on", []string{`2: "goes on"`}},
		"twice":                           {"a.md", "goes on, goes on", []string{`1: "goes on"`, `1: "goes on"`}},
		"a part of a word":                {"a.md", "undergoes on; go only; ways-in; go one", nil},
		"an apostrophe":                   {"a.md", "at Kata's word.", []string{`1: "Kata's word"`}},
		"across lines of a shell comment": {"a.sh", "# it goes\n# on\n", []string{`1: "goes on"`}},
		"a Go comment":                    {"a.go", "package a\n\n// A goes\n// on.\nvar A int\n", []string{`3: "goes on"`}},
		"a Go string":                     {"a.go", "package a\n\nvar a = \"it goes on\"\n", []string{`3: "goes on"`}},
		"a raw Go string":                 {"a.go", "package a\n\nvar a = `\nit goes on`\n", []string{`4: "goes on"`}},
		"Go identifiers, imports, tags":   {"a.go", "package a\n\nimport _ \"go on\"\n\ntype t struct{ a int `json:\"go on\"` }\n", nil},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			glossary, file := filepath.Join(dir, "glossary.md"), filepath.Join(dir, tc.file)
			for path, content := range map[string]string{glossary: page, file: tc.content} {
				if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			found, err := run(glossary, []string{file})
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for i, f := range found {
				line := strings.TrimPrefix(f.String(), file+":")
				if i < len(tc.want) && strings.HasPrefix(line, tc.want[i]) {
					line = tc.want[i]
				}
				got = append(got, line)
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

func TestTableRefused(t *testing.T) {
	for name, tc := range map[string]struct{ page, want string }{
		"no table":               {"# Glossary\n", "no section"},
		"an empty table":         {"\n" + heading + "\n\n| Not | But |\n|---|---|\n", "empty"},
		"a row without a phrase": {"\n" + heading + "\n\n| Not | But |\n|---|---|\n| takes (a value) | accepts |\n", "takes (a value)"},
		"a row of three columns": {"\n" + heading + "\n\n| Not | But |\n|---|---|\n| `a` | b | c |\n", "want a phrase"},
		"a row of one column":    {"\n" + heading + "\n\n| Not | But |\n|---|---|\n| `a` |\n", "want a phrase"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := parseTable(tc.page); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v lacks %q", err, tc.want)
			}
		})
	}
}

func TestWithin(t *testing.T) {
	for path, want := range map[string]string{
		"guestagent/a.go": "guestagent", "plugin/internal/task/a.go": "plugin/internal/task", "plugin/plugin.go": "", "guestagent.md": "",
	} {
		if got := within(path, "guestagent,plugin/internal/task/"); strings.TrimSuffix(got, "/") != want {
			t.Errorf("%s: %q, want %q", path, got, want)
		}
	}
	if got := within("a.go", ""); got != "" {
		t.Errorf("without directories: %q", got)
	}
}

// The glossary itself can be read.
func TestGlossary(t *testing.T) {
	if _, err := run("../../../docs/glossary.md", nil); err != nil {
		t.Error(err)
	}
}
