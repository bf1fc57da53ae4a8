// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
)

// heading starts the section of the glossary with the table.
const heading = "## Retired words"

// word is one retired word or phrase.
type word struct {
	phrase  string
	instead string
	pattern *regexp.Regexp
}

var quoted = regexp.MustCompile("`([^`]+)`")

// parseTable reads the phrases from the first column of the table, in
// backquotes, and what replaces them from the second.
func parseTable(page string) ([]word, error) {
	_, section, ok := strings.Cut(page, "\n"+heading+"\n")
	if !ok {
		return nil, fmt.Errorf("no section %q", heading)
	}
	section, _, _ = strings.Cut(section, "\n## ")
	var words []word
	row := 0
	for line := range strings.Lines(section) {
		line = strings.TrimSpace(line)
		if !strings.HasPrefix(line, "|") {
			continue
		}
		if row++; row <= 2 { // the column's names, and the line below them
			continue
		}
		cells := strings.Split(strings.Trim(line, "|"), "|")
		phrases := quoted.FindAllStringSubmatch(cells[0], -1)
		if len(cells) != 2 || len(phrases) == 0 {
			return nil, fmt.Errorf("row %q: want a phrase in backquotes and its replacement", line)
		}
		for _, p := range phrases {
			words = append(words, word{phrase: p[1], instead: strings.TrimSpace(cells[1]), pattern: compile(p[1])})
		}
	}
	if len(words) == 0 {
		return nil, errors.New("the table of retired words is empty")
	}
	return words, nil
}

// compile makes a pattern that matches a phrase as whole words, across the ends
// of lines, at the beginning of a sentence as within one. A hyphen is a part of
// a word: "ways-in" does not match "ways in".
func compile(phrase string) *regexp.Regexp {
	parts := strings.Fields(phrase)
	for i, p := range parts {
		parts[i] = regexp.QuoteMeta(p)
	}
	first := parts[0][:1]
	parts[0] = "[" + strings.ToLower(first) + strings.ToUpper(first) + "]" + parts[0][1:]
	return regexp.MustCompile(`(?:^|[^\pL\pN_-])(` + strings.Join(parts, `\s+`) + `)(?:$|[^\pL\pN_-])`)
}

// lines returns the line of each place where a text has the word.
func (w word) lines(t text) []int {
	var out []int
	for _, m := range w.pattern.FindAllStringSubmatchIndex(t.content, -1) {
		out = append(out, t.line+strings.Count(t.content[:m[2]], "\n"))
	}
	return out
}
