// SPDX-License-Identifier: Apache-2.0

// Package lazyregexp has regular expressions that are compiled when they are first
// used. The agent's binary is started for many a thing that needs none of them,
// sometimes while a container is frozen, and without KVM a guest takes a tenth of
// a second to compile all.
package lazyregexp

import (
	"regexp"
	"sync"
)

// Regexp is a regular expression.
type Regexp struct {
	compile func() *regexp.Regexp
}

// New returns a regular expression. One that cannot be parsed panics when it is
// first used.
func New(expr string) *Regexp {
	return &Regexp{sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(expr) })}
}

// MatchString is [regexp.Regexp.MatchString].
func (r *Regexp) MatchString(s string) bool { return r.compile().MatchString(s) }

// FindStringSubmatch is [regexp.Regexp.FindStringSubmatch].
func (r *Regexp) FindStringSubmatch(s string) []string { return r.compile().FindStringSubmatch(s) }

// FindAllStringSubmatchIndex is [regexp.Regexp.FindAllStringSubmatchIndex].
func (r *Regexp) FindAllStringSubmatchIndex(s string, n int) [][]int {
	return r.compile().FindAllStringSubmatchIndex(s, n)
}
