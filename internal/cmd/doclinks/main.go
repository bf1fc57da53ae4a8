// SPDX-License-Identifier: Apache-2.0

// Command doclinks checks that the relative links of the Markdown files that
// it is given lead to files and headings that exist, and that the tests and the
// scenarios that they name exist in the working directory.
package main

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

func main() {
	tests, err := readTests(".")
	if err != nil {
		fmt.Fprintln(os.Stderr, "doclinks:", err)
		os.Exit(2)
	}
	broken := 0
	for _, path := range os.Args[1:] {
		problems, err := check(path, tests)
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

// tests are what a page can name.
type tests struct {
	// packages are those of the tests, by the test's name.
	packages map[string][]string
	// scenarios are the names of the scenarios.
	scenarios map[string]bool
}

var (
	testPattern     = regexp.MustCompile(`(?m)^func ((?:Test|Fuzz|Benchmark)[A-Z]\w*)\(`)
	scenarioPattern = regexp.MustCompile(`\{name: "([a-z0-9.-]+)", kind: kind`)
)

// readTests finds the tests and scenarios below a directory.
func readTests(dir string) (*tests, error) {
	t := &tests{packages: make(map[string][]string), scenarios: make(map[string]bool)}
	sources := os.DirFS(dir)
	err := fs.WalkDir(sources, ".", func(path string, e fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case e.IsDir() && slices.Contains([]string{".git", "bin", "build"}, e.Name()):
			return fs.SkipDir
		case !strings.HasSuffix(path, "_test.go"):
			return nil
		}
		source, err := fs.ReadFile(sources, path)
		if err != nil {
			return err
		}
		for _, m := range testPattern.FindAllStringSubmatch(string(source), -1) {
			t.packages[m[1]] = append(t.packages[m[1]], filepath.Base(filepath.Dir(path)))
		}
		for _, m := range scenarioPattern.FindAllStringSubmatch(string(source), -1) {
			t.scenarios[m[1]] = true
		}
		return nil
	})
	return t, err
}

var (
	namedTest = regexp.MustCompile(`\b(?:Test|Fuzz|Benchmark)[A-Z]\w*`)
	// packageOf has the tests that a sentence attributes to a package.
	packageOf = regexp.MustCompile("((?:`?(?:Test|Fuzz)[A-Z]\\w*`?,? (?:and )?)+)of package (\\w+)")
	// namedScenarios has the names after the word: in backticks, or one with a
	// hyphen.
	namedScenarios = regexp.MustCompile("(?i)\\bscenarios? ((?:`[a-z0-9.-]+`(?:, (?:and )?| and )?)+|[a-z0-9]+-[a-z0-9.-]*[a-z0-9])")
	scenarioName   = regexp.MustCompile(`[a-z0-9][a-z0-9.-]*[a-z0-9]`)
)

// check returns a line for each test or scenario of a page that does not exist.
func (t *tests) check(page string) (problems []string) {
	for _, name := range namedTest.FindAllString(page, -1) {
		if t.packages[name] == nil {
			problems = append(problems, fmt.Sprintf("there is no %s", name))
		}
	}
	for _, m := range packageOf.FindAllStringSubmatch(page, -1) {
		for _, name := range namedTest.FindAllString(m[1], -1) {
			if in := t.packages[name]; in != nil && !slices.Contains(in, m[2]) {
				problems = append(problems, fmt.Sprintf("%s is in package %s, not %s", name, strings.Join(in, ", "), m[2]))
			}
		}
	}
	for _, m := range namedScenarios.FindAllStringSubmatch(page, -1) {
		for _, name := range scenarioName.FindAllString(m[1], -1) {
			if name != "and" && !t.scenarios[name] {
				problems = append(problems, fmt.Sprintf("there is no scenario %s", name))
			}
		}
	}
	return problems
}

// check returns a line for each link of the file that leads nowhere, and for each
// test that it names in vain.
func check(path string, t *tests) ([]string, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	problems := t.check(string(text))
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
