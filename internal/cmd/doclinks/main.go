// SPDX-License-Identifier: Apache-2.0

// Command doclinks checks that the relative links of the Markdown files that
// it is given lead to files and headings that exist.
package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

func main() {
	broken := 0
	for _, path := range os.Args[1:] {
		problems, err := check(path)
		if err != nil {
			fmt.Fprintln(os.Stderr, "doclinks:", err)
			os.Exit(2)
		}
		for _, p := range problems {
			fmt.Printf("%s: %s\n", path, p)
		}
		broken += len(problems)
	}
	if broken > 0 {
		os.Exit(1)
	}
}

var (
	linkPattern    = regexp.MustCompile(`\]\(([^()\s]+)\)`)
	headingPattern = regexp.MustCompile("(?m)^#+ +(.+?) *$")
	notAnchor      = regexp.MustCompile(`[^\p{L}\p{N}_ -]`)
)

// check returns a line for each link of the file that leads nowhere.
func check(path string) ([]string, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var problems []string
	for _, link := range linkPattern.FindAllStringSubmatch(string(text), -1) {
		target, anchor, _ := strings.Cut(link[1], "#")
		if strings.Contains(target, "://") || strings.HasPrefix(target, "mailto:") {
			continue // the network may be missing where this runs
		}
		file := path
		if target != "" {
			file = filepath.Join(filepath.Dir(path), target)
		}
		if _, err := os.Stat(file); err != nil {
			problems = append(problems, fmt.Sprintf("the link %q leads to no file", link[1]))
			continue
		}
		if anchor == "" || !strings.HasSuffix(file, ".md") {
			continue
		}
		page, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		if !hasHeading(string(page), anchor) {
			problems = append(problems, fmt.Sprintf("the link %q leads to no heading", link[1]))
		}
	}
	return problems, nil
}

// hasHeading reports whether a page has a heading that GitHub gives the anchor.
func hasHeading(page, anchor string) bool {
	for _, heading := range headingPattern.FindAllStringSubmatch(page, -1) {
		name := notAnchor.ReplaceAllString(strings.ToLower(heading[1]), "")
		if strings.ReplaceAll(name, " ", "-") == anchor {
			return true
		}
	}
	return false
}
