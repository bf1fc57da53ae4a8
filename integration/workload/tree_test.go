// SPDX-License-Identifier: Apache-2.0

package workload

import (
	"bytes"
	"os"
	"testing"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && (os.Args[1] == "tree-child" || os.Args[1] == "no-such-program") {
		if err := Main(os.Args[1:], os.Stdout); err != nil {
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

func TestTreeHoldsEverything(t *testing.T) {
	p := &tree{dir: t.TempDir(), watch: t.TempDir()}
	if err := p.setup(); err != nil {
		t.Fatal(err)
	}
	if have, want := rounds(t, p, 3), "round 1 of 10 things\nround 2 of 10 things\nround 3 of 10 things\n"; have != want {
		t.Errorf("printed %q, want %q", have, want)
	}
}

func TestTreeNoticesWhatIsMissing(t *testing.T) {
	p := &tree{dir: t.TempDir(), watch: t.TempDir()}
	if err := p.setup(); err != nil {
		t.Fatal(err)
	}
	rounds(t, p, 1)
	p.n++ // as if a round's memory had been lost
	if err := p.round(&bytes.Buffer{}); err == nil {
		t.Error("went on")
	}
}
