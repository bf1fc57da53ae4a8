// SPDX-License-Identifier: Apache-2.0

package criu

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A failure is one line, whatever CRIU has logged: its first error, and what to
// do about it.
func TestCause(t *testing.T) {
	for name, tc := range map[string]struct {
		log, first, advice string
	}{
		"a dump": {
			"(00.1) Dumping\n(00.2) Error (criu/sk-unix.c:874): unix: External socket is used.\n(00.3) Error (criu/cr-dump.c:9): Dumping FAILED.\n",
			"unix: External socket is used.", "close the connection"},
		"a restore, with the process": {
			"(00.045678)     12: Error (criu/files-reg.c:2345): File f has bad size 5 (expect 4)\n", "File f has bad size 5 (expect 4)", ""},
		"a restore, in the process": {"(00.1) pie: 12: Error (criu/pie/restorer.c:1): Can't map\n", "Can't map", ""},
		"advice for a later error": {
			"(00.2) Error (a.c:1): Can't write\n(00.3) Error (b.c:2): write: No space left on device\n", "Can't write", "free some"},
		"no error":                {"(00.1) Dumping\n(00.2) Warn  (criu/x.c:1): Error (that is not one)\n", "", ""},
		"an empty log":            {"", "", ""},
		"names with escape codes": {"(00.2) Error (a.c:1): Can't open \x1b[2Jf\n", "Can't open ?[2Jf", ""},
		"a long line":             {"(00.2) Error (a.c:1): " + strings.Repeat("x", 1000) + "\n", strings.Repeat("x", maxCause) + "...", ""},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "criu.log")
			if err := os.WriteFile(path, []byte(tc.log), 0o600); err != nil {
				t.Fatal(err)
			}
			first, advice, _ := cause(path)
			if first != tc.first || !strings.Contains(advice, tc.advice) || (advice == "") != (tc.advice == "") {
				t.Errorf("cause = %q, %q, want %q, %q", first, advice, tc.first, tc.advice)
			}
		})
	}
	if first, advice, code := cause(filepath.Join(t.TempDir(), "none")); first != "" || advice != "" || code != 0 {
		t.Errorf("%q, %q of no log", first, advice)
	}
}

func TestFormatVersion(t *testing.T) {
	for v, want := range map[uint32]string{40201: "4.2.1", 40200: "4.2", 31900: "3.19"} {
		if got := FormatVersion(v); got != want {
			t.Errorf("FormatVersion(%d) = %s, want %s", v, got, want)
		}
	}
}

func TestErrorSaysWhatToDo(t *testing.T) {
	err := &Error{What: "dump", Err: errors.New("unix: External socket is used")}
	if got, want := err.Error(), "criu dump failed: unix: External socket is used"; got != want {
		t.Errorf("%q, not %q", got, want)
	}
	err.Advice = "close the connection"
	if got, want := err.Error(), "close the connection (criu dump failed: unix: External socket is used)"; got != want {
		t.Errorf("%q, not %q", got, want)
	}
}

func TestRunID(t *testing.T) {
	for log, want := range map[string]string{
		"(00.000000) Version: 4.2\n(00.000000) CRIU run id = a87523ea-c469-4a3b-9c71-406fa3473908\n(00.000000) CRIU run id = 1b4e28ba-2fa1-11d2-883f-0016d3cca427\n(00.1) Dumping\n(00.2) CRIU run id = a name\n": "1b4e28ba-2fa1-11d2-883f-0016d3cca427",
		"(00.000001) CRIU run id = 0xfeed\n": "feed",
		"(00.000001) Version: 4.2\n":         "",
	} {
		path := filepath.Join(t.TempDir(), "criu.log")
		if err := os.WriteFile(path, []byte(log), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := RunID(path); got != want {
			t.Errorf("%q of %q, not %q", got, log, want)
		}
	}
	if got := RunID(filepath.Join(t.TempDir(), "none")); got != "" {
		t.Errorf("%q of no log", got)
	}
}
