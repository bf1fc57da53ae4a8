// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"bytes"
	"strings"
	"testing"
	"time"
)

func TestLongest(t *testing.T) {
	got, err := Longest([]string{"boot x", "round 1 longest 5", "round 2 longest 70", "round 3 longest 6"})
	if err != nil || got != 70 {
		t.Errorf("%d, %v", got, err)
	}
	if _, err := Longest([]string{"round 1"}); err == nil {
		t.Error("no error for a line without a gap")
	}
}

// The longest gap is that since the last round, and memory is written meanwhile.
func TestPulse(t *testing.T) {
	p := &pulse{mib: 1, percent: 10000}
	begin := time.Now()
	p.begin()
	var out bytes.Buffer
	for deadline := begin.Add(10 * time.Second); p.longest.Load() == 0 && time.Now().Before(deadline); {
	}
	if err := p.round(&out); err != nil {
		t.Fatal(err)
	}
	longest, err := Longest(strings.Split(strings.TrimSpace(out.String()), "\n"))
	if err != nil || longest <= 0 || longest > time.Since(begin) {
		t.Errorf("longest %s, %v", longest, err)
	}
}
