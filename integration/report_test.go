// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"cmp"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// report is what [TestMain] repeats at the very end.
var report struct {
	mu       sync.Mutex
	failures []string // in the order in which they came
	times    []scenarioTime
}

type scenarioTime struct {
	name string
	took time.Duration
}

// TestMain prints at the end how long each scenario took and why scenarios
// failed: their logs are thousands of lines, of which a reader may have only
// the last.
func TestMain(m *testing.M) {
	code := m.Run()
	report.mu.Lock()
	defer report.mu.Unlock()
	slices.SortStableFunc(report.times, func(a, b scenarioTime) int { return cmp.Compare(b.took, a.took) })
	for _, s := range report.times {
		fmt.Printf("%6.0f s  %s\n", s.took.Seconds(), s.name)
	}
	for _, failure := range report.failures {
		fmt.Println("FAILED", failure)
	}
	os.Exit(code)
}

// noteTime notes how long a scenario took.
func noteTime(name string, took time.Duration) {
	report.mu.Lock()
	defer report.mu.Unlock()
	report.times = append(report.times, scenarioTime{strings.TrimPrefix(name, "TestScenario/"), took})
}

// noteFailure notes why a scenario failed.
func (s *scenario) noteFailure(why string) {
	const longest = 2000 // characters
	why = strings.TrimSpace(why)
	if len(why) > longest {
		why = why[:longest] + " …"
	}
	report.mu.Lock()
	defer report.mu.Unlock()
	report.failures = append(report.failures, s.Name()+": "+why)
}

// Error is that of [testing.T], noted for the end.
func (s *scenario) Error(args ...any) {
	s.Helper()
	s.noteFailure(fmt.Sprintln(args...))
	s.T.Error(args...)
}

// Errorf is that of [testing.T], noted for the end.
func (s *scenario) Errorf(format string, args ...any) {
	s.Helper()
	s.noteFailure(fmt.Sprintf(format, args...))
	s.T.Errorf(format, args...)
}

// Fatal is that of [testing.T], noted for the end.
func (s *scenario) Fatal(args ...any) {
	s.Helper()
	s.noteFailure(fmt.Sprintln(args...))
	s.T.Fatal(args...)
}

// Fatalf is that of [testing.T], noted for the end.
func (s *scenario) Fatalf(format string, args ...any) {
	s.Helper()
	s.noteFailure(fmt.Sprintf(format, args...))
	s.T.Fatalf(format, args...)
}
