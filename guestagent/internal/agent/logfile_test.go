// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The log is in the guest's memory, for which no container is charged.
func TestTheLogIsBounded(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "agent.log")
	line := strings.Repeat("x", 1023) + "\n"
	for range 2 { // by an agent, and by the next one
		l, err := openLog(path)
		if err != nil {
			t.Fatal(err)
		}
		for range 3 * maxLog / len(line) / 2 {
			if _, err := l.Write([]byte(line)); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := l.Write([]byte("the end\n")); err != nil {
			t.Fatal(err)
		}
		l.file.Close()
	}
	files, err := os.ReadDir(dir)
	if err != nil || len(files) != 2 {
		t.Fatalf("%v, %v", files, err)
	}
	for _, f := range files {
		if st, err := f.Info(); err != nil || st.Size() > maxLog {
			t.Errorf("%s: %v, %v", f.Name(), st, err)
		}
	}
	if last, err := os.ReadFile(path); err != nil || !strings.HasSuffix(string(last), line+"the end\n") {
		t.Errorf("the last line is lost (%v)", err)
	}
}
