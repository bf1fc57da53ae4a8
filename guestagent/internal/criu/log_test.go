// SPDX-License-Identifier: Apache-2.0

package criu

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestTail(t *testing.T) {
	var many, ok []string
	for i := range 100 {
		many = append(many, fmt.Sprintf("(00.%03d) Error (x.c:1): number %d", i, i))
		ok = append(ok, fmt.Sprintf("(00.%03d) line %d", i, i))
	}
	for name, tc := range map[string]struct {
		log, want []string
	}{
		"an error with what came before": {
			[]string{"a", "b", "c", "d", "(00.1) Error (files.c:9): bad", "e"},
			[]string{"b", "c", "d", "(00.1) Error (files.c:9): bad"}},
		"no error: the last lines":          {ok, ok[len(ok)-contextLines:]},
		"the first of many count":           {many, append(slices.Clone(many[:maxQuoted]), "(60 more lines)")},
		"an empty log has nothing to quote": {nil, nil},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "criu.log")
			if err := os.WriteFile(path, []byte(strings.Join(tc.log, "\n")), 0o600); err != nil {
				t.Fatal(err)
			}
			if got := Tail(path); !slices.Equal(got, tc.want) {
				t.Errorf("Tail = %q, want %q", got, tc.want)
			}
		})
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
	err := &Error{What: "dump", Err: errors.New("operation failed"), Log: []string{"(02.4) Error (criu/sk-unix.c:874): unix: External socket is used. Consider using --ext-unix-sk option."}}
	for _, part := range []string{"unix socket", "outside of the container", "close the connection", "criu dump: operation failed", "sk-unix.c"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q lacks %q", err, part)
		}
	}
}

func TestRunID(t *testing.T) {
	for log, want := range map[string]string{
		"(00.000000) Version: 4.2\n(00.000001) CRIU run id = 1b4e28ba-2fa1-11d2-883f-0016d3cca427\n(00.1) CRIU run id = later\n": "1b4e28ba-2fa1-11d2-883f-0016d3cca427",
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
