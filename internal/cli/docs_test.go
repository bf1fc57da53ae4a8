// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// pages are those of the documentation that show commands.
func pages(t *testing.T) []string {
	t.Helper()
	list, err := filepath.Glob("../../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	return append(list, "../../README.md", "../../CONTRIBUTING.md")
}

var (
	inlineCode   = regexp.MustCompile("`([^`\n]+)`")
	ourCommand   = regexp.MustCompile(`(?:^|&& |sudo |bin/)kata-checkpoint((?: [^\s&|;#)]+)*)`)
	makeCommand  = regexp.MustCompile(`(?:^|&& )(?:[A-Z_]+=\S+ )*make ([a-z][a-z0-9-]*)`)
	makeTarget   = regexp.MustCompile(`(?m)^([a-z][a-z0-9-]*):`)
	placeholders = regexp.MustCompile(`^[A-Z…]`)
)

// Each command of ours on a page exists with the flags that it has there, and so
// does each target of the Makefile.
func TestCommandsOfThePages(t *testing.T) {
	makefile, err := os.ReadFile("../../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	targets := map[string]bool{}
	for _, m := range makeTarget.FindAllStringSubmatch(string(makefile), -1) {
		targets[m[1]] = true
	}
	commands, made := 0, 0
	for _, page := range pages(t) {
		data, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		var code []string
		for line := range strings.Lines(string(data)) {
			if strings.HasPrefix(line, "    ") {
				code = append(code, strings.TrimSpace(line))
				continue
			}
			for _, m := range inlineCode.FindAllStringSubmatch(line, -1) {
				code = append(code, m[1])
			}
		}
		for _, text := range code {
			for _, m := range ourCommand.FindAllStringSubmatch(text, -1) {
				if args := strings.Fields(m[1]); len(args) > 0 {
					commands++
					checkCommandLine(t, page, text, args)
				}
			}
			for _, m := range makeCommand.FindAllStringSubmatch(text, -1) {
				made++
				if !targets[m[1]] {
					t.Errorf("%s: the Makefile has no target %s: %s", page, m[1], text)
				}
			}
		}
	}
	if commands < 30 || made < 15 {
		t.Errorf("only %d commands and %d targets were found", commands, made)
	}
}

func checkCommandLine(t *testing.T, page, text string, args []string) {
	t.Helper()
	if args[0] == "help" || args[0] == "completion" || placeholders.MatchString(args[0]) {
		return // cobra's own
	}
	c, rest, err := Command().Find(args)
	if err != nil || !c.HasParent() {
		t.Errorf("%s: there is no command %s: %s", page, args[0], text)
		return
	}
	c.InitDefaultHelpFlag()
	for _, arg := range rest {
		name, long := strings.CutPrefix(arg, "--")
		name, _, _ = strings.Cut(strings.TrimRight(name, ",.:"), "=")
		switch {
		case long && c.Flags().Lookup(name) == nil && c.InheritedFlags().Lookup(name) == nil:
			t.Errorf("%s: %s has no flag --%s: %s", page, c.CommandPath(), name, text)
		case !long && len(arg) == 2 && arg[0] == '-' && c.Flags().ShorthandLookup(arg[1:]) == nil:
			t.Errorf("%s: %s has no flag %s: %s", page, c.CommandPath(), arg, text)
		}
	}
}
