// SPDX-License-Identifier: Apache-2.0

// Command vocabulary reports where files use words that the glossary retires.
//
//	vocabulary -glossary docs/glossary.md [-report-only DIR,DIR] FILE...
//
// In Go files it looks at comments and strings, in all others at the whole
// text. It exits with 1 if it finds any, except below the directories of
// -report-only, of which it only prints the number.
package main

import (
	"flag"
	"fmt"
	"os"
	"strings"
)

func main() {
	glossary := flag.String("glossary", "docs/glossary.md", "the page with the table of retired words")
	reportOnly := flag.String("report-only", "", "directories, separated by commas, in which retired words are no error")
	flag.Parse()
	findings, err := run(*glossary, flag.Args())
	if err != nil {
		fmt.Fprintln(os.Stderr, "vocabulary:", err)
		os.Exit(2)
	}
	tolerated := make(map[string]int)
	failed := false
	for _, f := range findings {
		if dir := within(f.path, *reportOnly); dir != "" {
			tolerated[dir]++
			continue
		}
		failed = true
		fmt.Println(f)
	}
	for dir, n := range tolerated {
		fmt.Printf("%s: %d retired words (not an error)\n", dir, n)
	}
	if failed {
		os.Exit(1)
	}
}

// within returns the directory of a list that a path is below.
func within(path, dirs string) string {
	for dir := range strings.SplitSeq(dirs, ",") {
		if dir != "" && strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/") {
			return dir
		}
	}
	return ""
}

func run(glossary string, files []string) ([]finding, error) {
	page, err := os.ReadFile(glossary)
	if err != nil {
		return nil, err
	}
	words, err := parseTable(string(page))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", glossary, err)
	}
	var findings []finding
	for _, path := range files {
		data, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		texts, err := texts(path, data)
		if err != nil {
			return nil, err
		}
		for _, t := range texts {
			for _, w := range words {
				for _, line := range w.lines(t) {
					findings = append(findings, finding{path, line, w})
				}
			}
		}
	}
	return findings, nil
}

type finding struct {
	path string
	line int
	word word
}

func (f finding) String() string {
	return fmt.Sprintf("%s:%d: %q is retired; the glossary has %q", f.path, f.line, f.word.phrase, f.word.instead)
}
