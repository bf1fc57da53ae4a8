// SPDX-License-Identifier: Apache-2.0

package netns

import (
	"os"
	"path/filepath"
	"testing"
)

func TestANamespaceHasANameUntilItIsRemoved(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("network namespaces are root's")
	}
	path := filepath.Join(t.TempDir(), "netns", "one")
	n, err := Make(path)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Remove() //nolint:errcheck // again, should the test end early
	ours, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	err = n.Do(func() error {
		theirs, err := os.Readlink("/proc/thread-self/ns/net")
		if theirs == ours {
			t.Error("still in the test's own namespace")
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	if err := n.Remove(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("the name is still there: %v", err)
	}
}
