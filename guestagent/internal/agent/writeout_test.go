// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"os"
	"path/filepath"
	"testing"
)

func TestWriteOutFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{path, path + " that is gone"} {
		if err := writeOutFile(t.Context(), path); err != nil {
			t.Errorf("%s: %v", path, err)
		}
	}
}
