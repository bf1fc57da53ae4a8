// SPDX-License-Identifier: Apache-2.0

package procfs

import (
	"fmt"
	"os"
	"testing"
)

// The name of a process may have any character.
func FuzzParseStat(f *testing.F) {
	own, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(own, "sh")
	f.Add([]byte("1 (a"), ") Z 1 2 3")
	f.Add([]byte(")"), "\n")
	f.Fuzz(func(t *testing.T, data []byte, name string) {
		_, _ = parseStat(data) // it may be anything
		const rest = " S 7 1 1 -1 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 4711 0"
		got, err := parseStat(fmt.Appendf(nil, "12 (%s)%s", name, rest))
		if want := (Stat{Name: name, State: 'S', Parent: 7, Session: 1, Terminal: 0xffffffff, StartTime: 4711}); err != nil || got != want {
			t.Errorf("%q: %+v, %v", name, got, err)
		}
	})
}
