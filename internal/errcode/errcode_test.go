// SPDX-License-Identifier: Apache-2.0

package errcode

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
)

// A text has one code, in the end, whatever the way to it.
func TestText(t *testing.T) {
	inner := Busy.Errorf("it is in progress")
	for want, err := range map[string]error{
		"":                            nil,
		"it is in progress (KC-1018)": inner,
		"checkpoint c: it is in progress (KC-1018)": fmt.Errorf("checkpoint c: %w", inner),
		"it is in progress: wait (KC-1018)":         fmt.Errorf("%w: wait", inner),
		"outer: it is in progress (KC-1018)":        Refused.Errorf("outer: %w", inner),
		"a; it is in progress (KC-1018)":            errors.Join(nil, fmt.Errorf("a; %w", inner)),
		"said by another (KC-2001)":                 errors.New("said by another (KC-2001)"),
		"said by another: wait (KC-2001)":           fmt.Errorf("%w: wait", errors.New("said by another (KC-2001)")),
		"one (KC-2001); two (KC-2002)":              Parse("one (KC-2001); two (KC-2002)"),
		"x: one (KC-2001); two: wait (KC-2002)":     fmt.Errorf("x: %w: wait", Parse("one (KC-2001); two (KC-2002)")),
		"plain (KC-9001)":                           errors.New("plain"),
		"write: no space left on device (KC-5001)":  fmt.Errorf("write: %w", syscall.ENOSPC),
		"context deadline exceeded (KC-9003)":       context.DeadlineExceeded,
		"c: not found (KC-9004)":                    fmt.Errorf("c: %w", errdefs.ErrNotFound),
	} {
		if got := Text(err); got != want {
			t.Errorf("%q, not %q", got, want)
		}
	}
}

// What arrives as text is the error that it was.
func TestParse(t *testing.T) {
	for text, want := range map[string]struct {
		sentence string
		code     Code
	}{
		"a (KC-2001)":              {"a", IOUring},
		"a (KC-2001); b (KC-2002)": {"a (KC-2001); b", TCPConnection},
		"a":                        {"a", 0},
		"a (KC-2001) ":             {"a (KC-2001) ", 0},
		"(KC-2001)":                {"(KC-2001)", 0},
		"":                         {"", 0},
	} {
		if err := Parse(text); err.Error() != want.sentence || Of(err) != want.code {
			t.Errorf("%q: %q with %v", text, err, Of(err))
		}
	}
	if err := Busy.Wrap(nil); err != nil || Of(nil) != 0 || Reason(nil) != 0 {
		t.Errorf("no error has the code %v", err)
	}
}

func TestCodesAsJSON(t *testing.T) {
	data, err := json.Marshal(map[string]Code{"code": IOUring})
	if err != nil || string(data) != `{"code":"KC-2001"}` {
		t.Fatalf("%s %v", data, err)
	}
	var back map[string]Code
	if err := json.Unmarshal(data, &back); err != nil || back["code"] != IOUring {
		t.Errorf("%v %v", back, err)
	}
	if err := json.Unmarshal([]byte(`{"code":"KC-0001"}`), &back); err == nil {
		t.Error("an unknown code is accepted")
	}
}

func TestLookup(t *testing.T) {
	for _, text := range []string{"KC-2001", "kc-2001", "2001"} {
		if e, ok := Lookup(text); !ok || e.Code != IOUring || e.Code.Name() != e.Name {
			t.Errorf("%s: %v", text, e)
		}
	}
	for _, text := range []string{"", "KC-", "KC-1", "IOUring", "99999"} {
		if e, ok := Lookup(text); ok {
			t.Errorf("%q is %v", text, e)
		}
	}
}

// Numbers and names are unique, and fit into texts and metrics.
func TestRegistry(t *testing.T) {
	name := regexp.MustCompile(`^[a-z]+(-[a-z]+)*$`)
	seen := map[string]bool{}
	for _, e := range All() {
		for _, key := range []string{e.Code.String(), e.Name, e.Summary} {
			if seen[key] {
				t.Errorf("%v: %q exists twice", e.Code, key)
			}
			seen[key] = true
		}
		if !name.MatchString(e.Name) || e.Code < 1000 || e.Code > 9999 || e.Summary == "" {
			t.Errorf("invalid: %v", e)
		}
	}
}
