package integration

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
)

// complaints are what scenarios failed for, in the order in which it was said.
var failures struct {
	mu   sync.Mutex
	said []string
}

// TestMain repeats at the very end why scenarios failed: their logs are thousands of lines, of which the last ones are all that a reader may have.
func TestMain(m *testing.M) {
	code := m.Run()
	failures.mu.Lock()
	defer failures.mu.Unlock()
	for _, what := range failures.said {
		fmt.Println("FAILED", what)
	}
	os.Exit(code)
}

// noteFailure notes what a scenario fails for.
func (s *scenario) noteFailure(what string) {
	const longest = 2000 // characters
	what = strings.TrimSpace(what)
	if len(what) > longest {
		what = what[:longest] + " …"
	}
	failures.mu.Lock()
	defer failures.mu.Unlock()
	failures.said = append(failures.said, s.Name()+": "+what)
}

// Error is [testing.T]'s, and noted for the end.
func (s *scenario) Error(args ...any) {
	s.Helper()
	s.noteFailure(fmt.Sprintln(args...))
	s.T.Error(args...)
}

// Errorf is [testing.T]'s, and noted for the end.
func (s *scenario) Errorf(format string, args ...any) {
	s.Helper()
	s.noteFailure(fmt.Sprintf(format, args...))
	s.T.Errorf(format, args...)
}

// Fatal is [testing.T]'s, and noted for the end.
func (s *scenario) Fatal(args ...any) {
	s.Helper()
	s.noteFailure(fmt.Sprintln(args...))
	s.T.Fatal(args...)
}

// Fatalf is [testing.T]'s, and noted for the end.
func (s *scenario) Fatalf(format string, args ...any) {
	s.Helper()
	s.noteFailure(fmt.Sprintf(format, args...))
	s.T.Fatalf(format, args...)
}
