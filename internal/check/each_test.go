// SPDX-License-Identifier: Apache-2.0

package check

import (
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// kind is a finding in the sources: a call of warn or fail.
type kind struct {
	at    string
	check string
	level Level
	// text matches what it says, of which known is the number of bytes that do
	// not depend on the case.
	text  *regexp.Regexp
	known int
}

// kinds are the findings that there can be, by the package's sources.
func kinds(t *testing.T) []kind {
	t.Helper()
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	var all []kind
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		set := token.NewFileSet()
		file, err := parser.ParseFile(set, name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range file.Decls {
			f, ok := d.(*ast.FuncDecl)
			if !ok || f.Body == nil || f.Name.Name == "warn" || f.Name.Name == "fail" || f.Name.Name == "add" {
				continue
			}
			constants := map[string]string{}
			ast.Inspect(f, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.ValueSpec:
					for i, v := range n.Values {
						constants[n.Names[i].Name] = text(v, constants)
					}
				case *ast.CallExpr:
					sel, ok := n.Fun.(*ast.SelectorExpr)
					level := map[string]Level{"warn": Warning, "fail": Error}
					if !ok || level[sel.Sel.Name] == OK || len(n.Args) < 3 {
						return true
					}
					format := text(n.Args[2], constants)
					at := set.Position(n.Pos()).String()
					check := text(n.Args[0], constants)
					if check == "" || format == "" {
						t.Fatalf("%s: the check or the text is not known", at)
					}
					pattern, known := "^", 0
					for i, literal := range regexp.MustCompile(`%(\[\d+\])?[a-z]`).Split(format, -1) {
						if i > 0 {
							pattern += "(?s:.*)"
						}
						pattern += regexp.QuoteMeta(literal)
						known += len(literal)
					}
					all = append(all, kind{at, check, level[sel.Sel.Name], regexp.MustCompile(pattern + "$"), known})
				}
				return true
			})
		}
	}
	return all
}

// text is the value of a constant expression of strings, as far as it is known.
func text(e ast.Expr, constants map[string]string) string {
	switch e := e.(type) {
	case *ast.BasicLit:
		s, err := strconv.Unquote(e.Value)
		if err != nil {
			return ""
		}
		return s
	case *ast.Ident:
		return constants[e.Name]
	case *ast.BinaryExpr:
		return text(e.X, constants) + text(e.Y, constants)
	}
	return ""
}

// Each finding that there can be is provoked by one of the tables' faults, and
// has a code of its own for its check.
func TestNoFindingLacksItsFault(t *testing.T) {
	all := kinds(t)
	if len(all) < 50 {
		t.Fatalf("only %d findings were found in the sources", len(all))
	}
	missing := map[string]kind{}
	for _, k := range all {
		missing[k.at] = k
		if findingCodes[k.check] == 0 {
			t.Errorf("%s: %s has no code", k.at, k.check)
		}
	}
	provoked := func(findings Findings) {
		for _, f := range findings {
			if f.Level == OK {
				continue
			}
			// The one that has most in common with it.
			best := -1
			for i, k := range all {
				if k.check == f.Check && k.level == f.Level && k.text.MatchString(f.Text) && (best < 0 || k.known > all[best].known) {
					best = i
				}
			}
			if best < 0 {
				t.Errorf("no finding of the sources says %s %s: %s", f.Level, f.Check, f.Text)
				continue
			}
			delete(missing, all[best].at)
		}
	}
	for name, c := range hostFaults() {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			c.fault(n)
			provoked(n.run())
		})
	}
	for name, c := range containerFaults() {
		t.Run("container, "+name, func(t *testing.T) { provoked(newNode(t).checkContainer(c)) })
	}
	for name, c := range guestFaults() {
		t.Run("guest, "+name, func(t *testing.T) { provoked(newNode(t).checkGuest(c)) })
	}
	for at, k := range missing {
		t.Errorf("%s: nothing provokes %s %s: %v", at, k.level, k.check, k.text)
	}
}
