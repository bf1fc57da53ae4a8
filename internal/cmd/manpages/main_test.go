// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kata-checkpoint/kata-checkpoint/internal/cli"
)

// Each command that a user sees has a page, and help that fits on a terminal.
func TestPages(t *testing.T) {
	share := t.TempDir()
	if err := write(share); err != nil {
		t.Fatal(err)
	}
	for _, c := range cli.Command().Commands() {
		if c.Hidden || c.Name() == "completion" || c.Name() == "help" {
			continue
		}
		page := filepath.Join(share, "man/man8", "kata-checkpoint-"+c.Name()+".8")
		if _, err := os.Stat(page); err != nil {
			t.Error(err)
		}
		for line := range strings.Lines(c.Long + "\n" + c.Short + "\n") {
			if len(strings.TrimSuffix(line, "\n")) > 80 {
				t.Errorf("%s: longer than 80 columns: %s", c.Name(), line)
			}
		}
	}
	for _, name := range []string{"man/man8/kata-checkpoint.8", "bash-completion/completions/kata-checkpoint", "zsh/site-functions/_kata-checkpoint", "fish/vendor_completions.d/kata-checkpoint.fish"} {
		if st, err := os.Stat(filepath.Join(share, name)); err != nil || st.Size() == 0 {
			t.Errorf("%s: %v, %v", name, st, err)
		}
	}
}
