// SPDX-License-Identifier: Apache-2.0

// Package text makes foreign text fit to be shown: names that processes of a
// container choose, logs of CRIU, and all that a guest says. It is valid UTF-8
// afterwards, which protobuf demands of strings, has no characters that a terminal
// takes for commands, and is short.
package text

import (
	"strings"
	"unicode"
	"unicode/utf8"
)

// Limits in bytes.
const (
	// MaxName is for a name within a sentence.
	MaxName = 256
	// MaxError is for an error's message, which may have lines of CRIU's log.
	MaxError = 16 << 10
)

// Line returns the beginning of a text in one line, at most limit bytes and a mark
// of what was left out.
func Line(s string, limit int) string { return printable(s, limit, unicode.IsPrint) }

// Lines is Line for text that may have several lines.
func Lines(s string, limit int) string { return printable(s, limit, isPrintable) }

// IsLines reports whether a text can be shown as it is.
func IsLines(s []byte) bool {
	for len(s) > 0 {
		r, n := utf8.DecodeRune(s)
		if r == utf8.RuneError && n <= 1 || !isPrintable(r) {
			return false
		}
		s = s[n:]
	}
	return true
}

func isPrintable(r rune) bool { return unicode.IsPrint(r) || r == '\n' || r == '\t' }

func printable(s string, limit int, ok func(rune) bool) string {
	mark := ""
	if len(s) > limit {
		for limit > 0 && !utf8.RuneStart(s[limit]) {
			limit-- // not in the middle of a character
		}
		s, mark = s[:limit], "…"
	}
	return strings.Map(func(r rune) rune {
		if ok(r) {
			return r
		}
		return '?'
	}, strings.ToValidUTF8(s, "?")) + mark
}
