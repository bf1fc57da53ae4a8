package screen

import (
	"bytes"
	"errors"
	"regexp"
	"testing"
	"time"
)

func TestStepIsOneLineWhereThereIsNoTerminal(t *testing.T) {
	var out bytes.Buffer
	s := &Screen{out: &out}
	broken := errors.New("broken")
	if err := s.Step("one", time.Second, func() error { return nil }); err != nil {
		t.Error(err)
	}
	if err := s.Step("two", time.Second, func() error { return broken }); !errors.Is(err, broken) {
		t.Errorf("gave %v", err)
	}
	if want := regexp.MustCompile(`^  one +0\.0 s  ok\n  two +0\.0 s  failed\n$`); !want.Match(out.Bytes()) {
		t.Errorf("wrote %q", out.String())
	}
}

func TestBarIsNotFullBeforeTheEnd(t *testing.T) {
	for elapsed, want := range map[time.Duration]string{
		0:               "[........................]",
		5 * time.Second: "[###########.............]",
		time.Hour:       "[#######################.]",
	} {
		if have := Bar(elapsed, 10*time.Second); have != want {
			t.Errorf("after %s: %s, want %s", elapsed, have, want)
		}
	}
}
