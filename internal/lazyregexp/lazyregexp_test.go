// SPDX-License-Identifier: Apache-2.0

package lazyregexp

import (
	"slices"
	"testing"
)

func TestRegexp(t *testing.T) {
	r := New(`([a-z]+)=([0-9]+)`)
	if !r.MatchString("a=1") || r.MatchString("a=b") {
		t.Error("MatchString is wrong")
	}
	if got := r.FindStringSubmatch("-ab=12-"); !slices.Equal(got, []string{"ab=12", "ab", "12"}) {
		t.Errorf("FindStringSubmatch returns %q", got)
	}
	if got := r.FindAllStringSubmatchIndex("a=1,b=2", -1); len(got) != 2 || !slices.Equal(got[1], []int{4, 7, 4, 5, 6, 7}) {
		t.Errorf("FindAllStringSubmatchIndex returns %v", got)
	}
}

// Nothing is compiled before it is used.
func TestCompilesLate(t *testing.T) {
	r := New(`(`)
	defer func() {
		if recover() == nil {
			t.Error("an expression that cannot be parsed matches")
		}
	}()
	r.MatchString("")
}
