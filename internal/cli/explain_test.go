// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
)

func TestExplain(t *testing.T) {
	for _, e := range errcode.All() {
		var out, stderr bytes.Buffer
		if status := Run(t.Context(), []string{"explain", e.Code.String()}, &out, &stderr); status != 0 {
			t.Fatalf("%v: %s", e.Code, stderr.String())
		}
		text := out.String()
		for _, want := range []string{e.Code.String(), e.Name, e.Summary, "\nCause: ", "\nCure: "} {
			if !strings.Contains(text, want) {
				t.Errorf("%v lacks %q: %s", e.Code, want, text)
			}
		}
		if strings.ContainsAny(text, "#*`") || strings.Contains(text, "](") {
			t.Errorf("%v has markup: %s", e.Code, text)
		}
	}
}

// Errors of the command line end with their codes, those of its usage with one
// code.
func TestErrorsHaveCodes(t *testing.T) {
	bad := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(bad, []byte("no_such_key = 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct{ args, want string }{
		{"explain", "(KC-1001)"},
		{"explain KC-0000", "(KC-1001)"},
		{"no-such-command", "(KC-1001)"},
		{"check --no-such-flag", "(KC-1001)"},
		{"check --config /dev/null --guest c1", "(KC-1001)"},
		{"check --config " + bad, "(KC-1002)"},
		{"install --from /no/such/directory", "(KC-6001)"},
		{"guest-kernel --kata-config a --kata-src b", "(KC-1001)"},
	} {
		var stderr bytes.Buffer
		status := Run(t.Context(), strings.Fields(tc.args), &stderr, &stderr)
		if text := strings.TrimSpace(stderr.String()); status != exitError || !strings.HasSuffix(text, " "+tc.want) || strings.Count(text, "KC-") != strings.Count(tc.args, "KC-")+strings.Count(text, "such as KC-")+1 {
			t.Errorf("%s: status %d, %q", tc.args, status, text)
		}
	}
}

// An error of the usage says how the command is used.
func TestUsageErrorsSayHow(t *testing.T) {
	for args, want := range map[string]string{
		"inspect a b":      "accepts 1 arg(s), received 2: use `kata-checkpoint inspect NAME [flags]`, see `kata-checkpoint inspect --help` (KC-1001)",
		"verify --no-such": "unknown flag: --no-such: use `kata-checkpoint verify [NAME...] [flags]`, see `kata-checkpoint verify --help` (KC-1001)",
		"inspec a":         "unknown command \"inspec\" for \"kata-checkpoint\": did you mean inspect? (KC-1001)",
		"snapshot":         "unknown command \"snapshot\" for \"kata-checkpoint\": see `kata-checkpoint --help` for the commands (KC-1001)",
		"trust forget":     "unknown command \"forget\" for \"kata-checkpoint trust\": see `kata-checkpoint trust --help` for the commands (KC-1001)",
	} {
		var stderr bytes.Buffer
		status := Run(t.Context(), strings.Fields(args), &stderr, &stderr)
		if have := strings.TrimSpace(stderr.String()); status != exitError || have != "kata-checkpoint: "+want {
			t.Errorf("%s: status %d, %s, want %s", args, status, have, want)
		}
	}
}
