// SPDX-License-Identifier: Apache-2.0

package text

import (
	"strings"
	"testing"
	"unicode/utf8"
)

func TestForeignText(t *testing.T) {
	for in, want := range map[string][2]string{
		"plain":                       {"plain", "plain"},
		"caf\xe9.txt":                 {"caf?.txt", "caf?.txt"},
		"é 日本":                        {"é 日本", "é 日本"},
		"\x1b[2J\x1b]0;title\a":       {"?[2J?]0;title?", "?[2J?]0;title?"},
		"\u202egnp.exe\u200b":         {"?gnp.exe?", "?gnp.exe?"}, // which change the direction, or are not seen
		"two\nlines\tand\r":           {"two?lines?and?", "two\nlines\tand?"},
		"\u009b31m":                   {"?31m", "?31m"}, // as an escape and a bracket
		"":                            {"", ""},
		strings.Repeat("a", 21):       {strings.Repeat("a", 20) + "…", strings.Repeat("a", 20) + "…"},
		strings.Repeat("é", 10):       {strings.Repeat("é", 10), strings.Repeat("é", 10)},
		"a" + strings.Repeat("é", 10): {"a" + strings.Repeat("é", 9) + "…", "a" + strings.Repeat("é", 9) + "…"},
	} {
		if line, lines := Line(in, 20), Lines(in, 20); line != want[0] || lines != want[1] {
			t.Errorf("%q: %q and %q, want %q", in, line, lines, want)
		}
	}
}

func FuzzForeignText(f *testing.F) {
	f.Add("a\xff\x1b", 3)
	f.Add("日本", 4)
	f.Fuzz(func(t *testing.T, s string, limit int) {
		limit &= 1<<10 - 1
		for _, out := range []string{Line(s, limit), Lines(s, limit)} {
			if !utf8.ValidString(out) || len(out) > limit+len("…") || !IsLines([]byte(out)) {
				t.Errorf("%q becomes %q", s, out)
			}
		}
		if out := Lines(s, len(s)); IsLines([]byte(s)) && out != s {
			t.Errorf("%q becomes %q", s, out)
		}
	})
}
