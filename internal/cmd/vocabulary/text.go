// SPDX-License-Identifier: Apache-2.0

package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"strconv"
	"strings"
)

// text is what people read in a file, and the line that it begins in.
type text struct {
	line    int
	content string
}

// texts returns the comments and strings of a Go file, the whole of any other.
func texts(path string, data []byte) ([]text, error) {
	if filepath.Ext(path) != ".go" {
		return []text{{1, withoutLeaders(string(data))}}, nil
	}
	set := token.NewFileSet()
	file, err := parser.ParseFile(set, path, data, parser.ParseComments|parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	var out []text
	for _, group := range file.Comments {
		var lines []string
		for _, c := range group.List {
			lines = append(lines, c.Text)
		}
		out = append(out, text{set.Position(group.Pos()).Line, withoutLeaders(strings.Join(lines, "\n"))})
	}
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.ImportSpec:
			return false
		case *ast.Field:
			n.Tag = nil
		case *ast.BasicLit:
			if n.Kind != token.STRING {
				break
			}
			if s, err := strconv.Unquote(n.Value); err == nil {
				out = append(out, text{set.Position(n.Pos()).Line, s})
			}
		}
		return true
	})
	return out, nil
}

// withoutLeaders removes what starts the lines of a comment, so that a phrase
// is found across the end of a line.
func withoutLeaders(s string) string {
	lines := strings.Split(s, "\n")
	for i, line := range lines {
		lines[i] = strings.TrimLeft(line, " \t/#*")
	}
	return strings.Join(lines, "\n")
}
