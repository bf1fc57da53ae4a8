// SPDX-License-Identifier: Apache-2.0

package testbed

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestOnlyTheTestbedsNetworkNamespacesGo(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounts are root's")
	}
	tb, names := &Testbed{Dir: t.TempDir()}, t.TempDir()
	if err := os.Mkdir(tb.logDir(), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, noted := range map[string]string{
		"kata-box": "box", "cnitest-1": "box", "cnitest-2": "other", "cnitest-in-use": "box", // a sandbox's own
		"cni-3": "box", "kata-other": "box", // an engine's
		"cnitest-4": "", "kata-elsewhere": "", // of another testbed
	} {
		path := filepath.Join(names, name)
		if err := os.WriteFile(path, nil, 0o444); err != nil {
			t.Fatal(err)
		}
		if noted != "" {
			note(t, tb, noted, path)
		}
	}
	note(t, tb, "box", filepath.Join(names, "cnitest-gone"))
	mounted := filepath.Join(names, "cnitest-in-use")
	if err := unix.Mount("/proc/self/ns/net", mounted, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(mounted, unix.MNT_DETACH) //nolint:errcheck // the test is over

	if err := tb.removeNetworkNamespaces(); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(names)
	if err != nil {
		t.Fatal(err)
	}
	var left []string
	for _, e := range entries {
		left = append(left, e.Name())
	}
	if got, want := strings.Join(left, " "), "cni-3 cnitest-4 cnitest-in-use kata-elsewhere kata-other"; got != want {
		t.Errorf("left: %s, want %s", got, want)
	}
}

func note(t *testing.T, tb *Testbed, machine, path string) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(tb.logDir(), machine+".netns"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString(path + "\n"); err != nil {
		t.Fatal(err)
	}
}
