package main

import (
	"bytes"
	"strings"
	"testing"
	"time"
)

func TestMedian(t *testing.T) {
	for want, values := range map[time.Duration][]time.Duration{0: nil, 3: {9, 1, 3}, 4: {9, 3, 5, 1}} {
		if have := median(values); have != want {
			t.Errorf("median of %v is %d, want %d", values, have, want)
		}
	}
}

func TestVerdictNamesWhatIsOutOfBounds(t *testing.T) {
	var out bytes.Buffer
	table := &table{out: &out}
	table.bounded("kept", "%.2f", 1.10, 1.10)
	if err := table.verdict(); err != nil {
		t.Error(err)
	}
	table.bounded("slow", "%.2f", 1.2, 1.1)
	if err := table.verdict(); err == nil || !strings.HasSuffix(err.Error(), ": slow") {
		t.Errorf("verdict is %v", err)
	}
	if !strings.Contains(out.String(), "1.20   (at most 1.10: MISSED)") {
		t.Errorf("printed %q", out.String())
	}
}
