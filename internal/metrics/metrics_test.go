// SPDX-License-Identifier: Apache-2.0

package metrics

import (
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"testing"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
)

func opened(t *testing.T) Spool {
	t.Helper()
	s := Spool{filepath.Join(t.TempDir(), "spool")}
	if err := s.Open(); err != nil {
		t.Fatal(err)
	}
	return s
}

func take(t *testing.T, s Spool) Content {
	t.Helper()
	c, err := s.Take()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// What a shim reports arrives, once.
func TestReports(t *testing.T) {
	s := opened(t)
	o := s.Begin(Checkpoint)
	if c := take(t, s); len(c.Running) != 1 || c.Running[0].Operation != Checkpoint || len(c.Done) != 0 {
		t.Fatalf("in progress: %v", c)
	}
	o.End(Report{Bytes: 7, Phases: []Phase{{"freeze", 0.5}}, Container: "c1"}, nil)
	s.Begin(Restore).End(Report{Seconds: 3}, errcode.Damaged.Wrap(errors.New("it is damaged")))
	s.Begin(Restore).Drop()
	s.Report(Report{Operation: Frozen, Seconds: 2})
	c := take(t, s)
	slices.SortFunc(c.Done, func(a, b Report) int { return int(a.Seconds - b.Seconds) })
	if len(c.Done) != 3 || len(c.Running) != 0 || c.Invalid != 0 {
		t.Fatalf("%v", c)
	}
	if r := c.Done[0]; r.Operation != Checkpoint || r.Bytes != 7 || r.Reason != Success || r.Seconds <= 0 || r.Begin.IsZero() || r.Phases[0].Name != "freeze" || r.Container != "c1" {
		t.Errorf("%v", r)
	}
	if r := c.Done[2]; r.Operation != Restore || r.Reason != "damaged" || r.Seconds != 3 {
		t.Errorf("%v", r)
	}
	if c := take(t, s); len(c.Done)+len(c.Running) != 0 {
		t.Errorf("taken twice: %v", c)
	}
	if left, err := os.ReadDir(s.Dir); err != nil || len(left) != 0 {
		t.Errorf("left in the spool: %v (%v)", left, err)
	}
}

// Where nobody has made a spool, nothing is written, and nothing fails.
func TestNobodyWantsReports(t *testing.T) {
	for _, s := range []Spool{{}, {filepath.Join(t.TempDir(), "none")}} {
		s.Begin(Checkpoint).End(Report{}, nil)
		s.Report(Report{Operation: Frozen})
		if c := take(t, s); len(c.Done) != 0 {
			t.Errorf("%v", c)
		}
	}
	if left, err := os.ReadDir(filepath.Join(t.TempDir(), "none")); err == nil {
		t.Errorf("made: %v", left)
	}
}

// Nobody takes the reports: the spool does not grow indefinitely.
func TestSpoolIsBounded(t *testing.T) {
	s := opened(t)
	for range maxFiles + 10 {
		s.Report(Report{Operation: Frozen})
	}
	if n := len(take(t, s).Done); n != maxFiles {
		t.Errorf("%d reports are kept", n)
	}
}

// A shim that was killed has nothing in progress, and what is not a report counts
// as such.
func TestRemains(t *testing.T) {
	s := opened(t)
	o := s.Begin(Checkpoint)
	o.file.Close() // as its process does
	for name, content := range map[string]string{"done-a": "{", "done-b": "", "done-c": `{"operation":"frozen","seconds":1}`, "other": "x"} {
		if err := os.WriteFile(filepath.Join(s.Dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if c := take(t, s); len(c.Running) != 0 || len(c.Done) != 1 || c.Invalid != 2 {
		t.Errorf("%v", c)
	}
	left, err := os.ReadDir(s.Dir)
	if err != nil || len(left) != 1 || left[0].Name() != "other" {
		t.Errorf("left: %v (%v)", left, err)
	}
	if err := os.Chmod(s.Dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := s.Open(); errcode.Of(err) != errcode.ForeignWriter {
		t.Errorf("a spool that anybody may write to: %v", err)
	}
}

// Each phase of the shim and the agent is known.
func TestPhasesAreKnown(t *testing.T) {
	found := 0
	for file, prefix := range map[string]string{
		"../../plugin/internal/task/checkpoint.go":      "",
		"../../guestagent/internal/agent/checkpoint.go": "guest: ",
		"../../guestagent/internal/agent/restore.go":    "guest: ",
	} {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`\b(?:ph|phases)\.done\((?:ctx, )?"([^"]+)"\)`).FindAllStringSubmatch(string(data), -1) {
			found++
			if name := prefix + m[1]; PhaseName(name) != name {
				t.Errorf("%s: the phase %q has no name in metrics", file, name)
			}
		}
	}
	if found < 15 {
		t.Errorf("only %d phases were found", found)
	}
	if name := PhaseName("made up by a guest"); name != "other" {
		t.Errorf("a foreign phase is called %q", name)
	}
}
