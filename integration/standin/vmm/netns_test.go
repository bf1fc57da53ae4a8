// SPDX-License-Identifier: Apache-2.0

package vmm

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/netns"
)

func TestTheNetworkNamespaceIsNoted(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("network namespaces are root's")
	}
	dir := t.TempDir()
	want := ""
	for _, name := range []string{"first", "second"} {
		ns, err := netns.Make(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		defer ns.Remove() //nolint:errcheck // the test is over
		if err := ns.Do(func() error { return NoteNamespace(dir, "box") }); err != nil {
			t.Fatal(err)
		}
		want += ns.Path + "\n"
	}
	if got, err := os.ReadFile(filepath.Join(dir, "box.netns")); string(got) != want {
		t.Errorf("noted %q, want %q: %v", got, want, err)
	}
}
