package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/vmm"
	"github.com/kata-checkpoint/kata-checkpoint/integration/testbed"
)

// table prints results as they come and remembers which bounds were not kept.
type table struct {
	out    io.Writer
	missed []string
}

// machine says what was measured on.
func (t *table) machine(bed *testbed.Testbed) {
	var settings vmm.Settings
	if data, err := os.ReadFile(filepath.Join(bed.Dir, "bin/testbed-vmm.json")); err == nil {
		_ = json.Unmarshal(data, &settings)
	}
	kata := "the stand-in for Kata"
	if bed.Kata != "" {
		kata = "Kata in " + bed.Kata
	}
	fmt.Fprintf(t.out, "%s, %d cores, %s (%s way); medians\n", strings.ToUpper(settings.Accel), runtime.NumCPU(), kata, bed.Way)
}

func (t *table) heading(text string) { fmt.Fprintf(t.out, "\n%s\n", text) }

func (t *table) row(name, format string, args ...any) {
	fmt.Fprintf(t.out, "  %-58s %s\n", name, fmt.Sprintf(format, args...))
}

// bounded is a row with a value that should not be greater than its bound.
func (t *table) bounded(name, format string, value, bound float64) {
	verdict := "ok"
	if value > bound {
		verdict = "MISSED"
		t.missed = append(t.missed, name)
	}
	t.row(name, format+"   (at most "+format+": %s)", value, bound, verdict)
}

func (t *table) verdict() error {
	if len(t.missed) > 0 {
		return fmt.Errorf("out of bounds: %s", strings.Join(t.missed, "; "))
	}
	return nil
}

func median[T time.Duration | float64](values []T) T {
	if len(values) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(values))
	return (sorted[(len(sorted)-1)/2] + sorted[len(sorted)/2]) / 2
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
