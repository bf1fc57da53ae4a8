// SPDX-License-Identifier: Apache-2.0

package errcode

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/kata-checkpoint/kata-checkpoint/docs"
)

// root is where the module is.
const root = "../.."

// section is an entry of docs/troubleshooting.md.
type section struct{ sentence, cause, cure string }

func sections(t *testing.T) map[string]section {
	t.Helper()
	out := map[string]section{}
	for i, part := range strings.Split(docs.Troubleshooting, "\n### ") {
		if i == 0 {
			continue
		}
		title, text, _ := strings.Cut(part, "\n")
		if _, twice := out[title]; twice {
			t.Errorf("%s has two entries", title)
		}
		text, _, _ = strings.Cut(text, "\n## ")
		var s section
		text, s.cure, _ = strings.Cut(text, "**Cure:** ")
		text, s.cause, _ = strings.Cut(text, "**Cause:** ")
		s.sentence = strings.TrimPrefix(strings.TrimSpace(text), "> ")
		out[title] = s
	}
	return out
}

// Each code has its entry in docs/troubleshooting.md, with a sentence that our
// programs print, a cause and a cure, and each entry is of a code.
func TestEachCodeHasItsEntry(t *testing.T) {
	found := sections(t)
	literals := strings.Join(slices.Collect(maps.Keys(source(t).literals)), "\x00")
	for _, e := range All() {
		s, ok := found[e.Code.String()]
		if !ok {
			t.Errorf("%v has no entry in docs/troubleshooting.md", e.Code)
			continue
		}
		delete(found, e.Code.String())
		if strings.TrimSpace(s.cause) == "" || strings.TrimSpace(s.cure) == "" {
			t.Errorf("%v lacks a cause or a cure", e.Code)
		}
		if s.sentence == "" && e.Code < Failed {
			t.Errorf("%v lacks its sentence", e.Code)
		}
		for part := range strings.SplitSeq(s.sentence, "…") {
			part = strings.Trim(strings.TrimPrefix(part, "the container "), " ,:()")
			if !strings.Contains(literals, part) {
				t.Errorf("%v: nothing prints %q", e.Code, part)
			}
		}
	}
	for title := range found {
		t.Errorf("docs/troubleshooting.md has an entry of %s, which does not exist", title)
	}
}

// A code that nothing has would be a promise without anything behind it.
func TestEachCodeIsUsed(t *testing.T) {
	used := source(t).codes
	for name, code := range declared(t) {
		if !used[name] {
			t.Errorf("nothing has the code %s (%s)", name, code)
		}
	}
}

// In docs/limits.md each refusal names its code, and what stands in the way of a
// checkpoint or a restore is there.
func TestLimitsNameTheirCodes(t *testing.T) {
	data, err := os.ReadFile(filepath.Join(root, "docs/limits.md"))
	if err != nil {
		t.Fatal(err)
	}
	literals := strings.Join(slices.Collect(maps.Keys(source(t).literals)), "\x00")
	quoted := regexp.MustCompile("`([^`]+)`")
	link := regexp.MustCompile(`\[KC-(\d+)\]\(troubleshooting\.md#kc-(\d+)\)`)
	named := map[string]bool{}
	table := false
	for line := range strings.Lines(string(data)) {
		switch {
		case strings.HasPrefix(line, "| The message contains"):
			table = true
		case !strings.HasPrefix(line, "|"):
			table = false
		case table && !strings.HasPrefix(line, "|---"):
			first, _, _ := strings.Cut(line[1:], "|")
			for _, q := range quoted.FindAllStringSubmatch(first, -1) {
				for part := range strings.SplitSeq(q[1], "…") {
					if part = strings.Trim(part, " ,:"); !strings.Contains(literals, part) {
						t.Errorf("nothing prints %q", part)
					}
				}
			}
			links := link.FindAllStringSubmatch(line, -1)
			if len(links) == 0 {
				t.Errorf("a refusal without a code: %s", line)
			}
			for _, l := range links {
				if _, ok := Lookup(l[1]); !ok || l[1] != l[2] {
					t.Errorf("%s is not the code of an entry", l[0])
				}
				named[l[1]] = true
			}
		}
	}
	for _, e := range All() {
		n := strings.TrimPrefix(e.Code.String(), prefix)
		if e.Code > Refused && e.Code < DumpFailed && !named[n] {
			t.Errorf("docs/limits.md does not have %v, %s", e.Code, e.Summary)
		}
	}
}

// written is what is in the product's sources.
type written struct {
	// literals are its strings, joined where they are added to each other.
	literals map[string]bool
	// codes are those of this package that are used outside of its list.
	codes map[string]bool
}

func source(t *testing.T) written {
	t.Helper()
	w := written{map[string]bool{}, map[string]bool{}}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := d.Name()
		if d.IsDir() {
			switch name {
			case "integration", "build", "bin", ".git", "testdata", "fake":
				return fs.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go") || strings.HasSuffix(name, ".pb.go") || name == "codes.go" {
			return nil
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		w.read(file)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func (w written) read(file *ast.File) {
	own := file.Name.Name == "errcode"
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.BinaryExpr:
			if n.Op == token.ADD {
				w.literals[text(n)] = true
			}
		case *ast.BasicLit:
			w.literals[text(n)] = true
		case *ast.SelectorExpr:
			if x, ok := n.X.(*ast.Ident); ok && x.Name == "errcode" {
				w.codes[n.Sel.Name] = true
			}
		case *ast.Ident:
			if own {
				w.codes[n.Name] = true
			}
		}
		return true
	})
}

// text is the value of a string, with a gap for what is not known. A verb of a
// format is one.
func text(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.BinaryExpr:
		return text(e.X) + text(e.Y)
	case *ast.BasicLit:
		if s, err := strconv.Unquote(e.Value); err == nil && e.Kind == token.STRING {
			return s
		}
	}
	return "\x00"
}

// declared are the names of the codes.
func declared(t *testing.T) map[string]string {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), "codes.go", nil, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	ast.Inspect(file, func(n ast.Node) bool {
		if v, ok := n.(*ast.ValueSpec); ok {
			out[v.Names[0].Name] = v.Values[0].(*ast.CallExpr).Args[0].(*ast.BasicLit).Value
		}
		return true
	})
	if len(out) != len(entries) {
		t.Fatalf("%d codes are declared, and %d exist", len(out), len(entries))
	}
	return out
}
