// SPDX-License-Identifier: Apache-2.0

// Command manpages writes the manual pages of kata-checkpoint and its completion
// for shells, from the command line's own definitions:
//
//	manpages DIRECTORY
//
// The directory gets the layout of /usr/share.
package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/spf13/cobra/doc"

	"github.com/kata-checkpoint/kata-checkpoint/internal/cli"
	"github.com/kata-checkpoint/kata-checkpoint/internal/version"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: manpages DIRECTORY")
		os.Exit(2)
	}
	if err := write(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "manpages:", err)
		os.Exit(1)
	}
}

func write(share string) error {
	root := cli.Command()
	root.DisableAutoGenTag = true
	man := filepath.Join(share, "man/man8")
	completions := map[string]func(string) error{
		"bash-completion/completions/kata-checkpoint":    func(p string) error { return root.GenBashCompletionFileV2(p, true) },
		"zsh/site-functions/_kata-checkpoint":            root.GenZshCompletionFile,
		"fish/vendor_completions.d/kata-checkpoint.fish": func(p string) error { return root.GenFishCompletionFile(p, true) },
	}
	if err := os.MkdirAll(man, 0o755); err != nil {
		return err
	}
	header := &doc.GenManHeader{Section: "8", Source: "kata-checkpoint " + version.Version, Manual: "kata-checkpoint"}
	// The pages are the same whenever they are made.
	if seconds, err := strconv.ParseInt(os.Getenv("SOURCE_DATE_EPOCH"), 10, 64); err == nil {
		date := time.Unix(seconds, 0).UTC()
		header.Date = &date
	}
	err := doc.GenManTree(root, header, man)
	for name, generate := range completions {
		path := filepath.Join(share, name)
		err = errors.Join(err, os.MkdirAll(filepath.Dir(path), 0o755), generate(path))
	}
	return err
}
