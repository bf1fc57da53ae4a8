// SPDX-License-Identifier: Apache-2.0

package criu

import (
	"os"
	"path/filepath"
	"testing"
	"unicode"
	"unicode/utf8"
)

// CRIU's log has names that a container has chosen. What is quoted of it is one
// short line that can be printed.
func FuzzLog(f *testing.F) {
	f.Add([]byte("(00.000001) CRIU run id = 0x0123\n(00.000002) CRIU run id = 4567\n(00.1)  7: Error (criu/files.c:1): \x1b[2J External socket is used\n"))
	f.Add([]byte("(00.1) pie: 12: Error (x): \xff\xfe\n"))
	f.Fuzz(func(t *testing.T, log []byte) {
		path := filepath.Join(t.TempDir(), logName)
		if err := os.WriteFile(path, log, 0o600); err != nil {
			t.Fatal(err)
		}
		first, _, _ := cause(path)
		if !utf8.ValidString(first) || utf8.RuneCountInString(first) > maxCause+3 {
			t.Errorf("%q", first)
		}
		for _, r := range first {
			if !unicode.IsPrint(r) {
				t.Errorf("%q has %q", first, r)
			}
		}
		_ = RunID(path)
	})
}
