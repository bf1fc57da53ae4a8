// SPDX-License-Identifier: Apache-2.0

// Package check looks at a node and says what stands in the way of a checkpoint:
// containerd, the runtime, Kata and its configuration, the guest bundle, the
// guest's kernel, and the disk. It changes nothing.
package check

import (
	"cmp"
	"context"
	"fmt"
	"slices"
)

// Level is how bad a finding is.
type Level int

// Levels. A Warning does not prevent a checkpoint of every container, an Error
// does.
const (
	OK Level = iota
	Warning
	Error
)

func (l Level) String() string { return [...]string{"ok", "warning", "error"}[l] }

// MarshalText is for JSON.
func (l Level) MarshalText() ([]byte, error) { return []byte(l.String()), nil }

// UnmarshalText is for JSON.
func (l *Level) UnmarshalText(text []byte) error {
	for *l = OK; *l <= Error; *l++ {
		if l.String() == string(text) {
			return nil
		}
	}
	return fmt.Errorf("unknown level %q", text)
}

// Finding is one line of the answer.
type Finding struct {
	// Check is the name of what was looked at, kata.shared_fs for example. It
	// does not change between releases.
	Check string `json:"check"`
	Level Level  `json:"level"`
	// Text is what was found and, if that is not OK, what it means.
	Text string `json:"text"`
	// Cure is a command or a setting that mends it, empty if the level is OK.
	Cure string `json:"cure,omitempty"`
}

// Findings are in the order in which they were made.
type Findings []Finding

// Worst is the highest level of them, OK if there are none.
func (f Findings) Worst() Level {
	if len(f) == 0 {
		return OK
	}
	return slices.MaxFunc(f, func(a, b Finding) int { return cmp.Compare(a.Level, b.Level) }).Level
}

func (f *Findings) ok(check, format string, args ...any) {
	*f = append(*f, Finding{Check: check, Text: fmt.Sprintf(format, args...)})
}

func (f *Findings) warn(check, cure, format string, args ...any) {
	*f = append(*f, Finding{check, Warning, fmt.Sprintf(format, args...), cure})
}

func (f *Findings) fail(check, cure, format string, args ...any) {
	*f = append(*f, Finding{check, Error, fmt.Sprintf(format, args...), cure})
}

// Run makes all checks of the host. What cannot be looked at because something
// else is missing is left out: that finding names the cure.
func (h *Host) Run(ctx context.Context) Findings {
	var f Findings
	cd := h.containerd(ctx, &f)
	h.runtime(cd, &f)
	h.nri(cd, &f)
	h.kata(ctx, cd, &f)
	h.bundle(ctx, &f)
	h.criu(ctx, cd, &f)
	h.stateDir(&f)
	return f
}
