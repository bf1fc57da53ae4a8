// SPDX-License-Identifier: Apache-2.0

package share

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/internal/thread"
	"github.com/kata-checkpoint/kata-checkpoint/integration/standin/way"
)

func TestVolumesAreNamedAsKataNamesThem(t *testing.T) {
	m := specs.Mount{Source: "/var/lib/vol-a", Destination: "/data/in"}
	for w, want := range map[way.Way]string{
		way.Go:   "c1-0123456789abcdef-in",
		way.Rust: "sandbox-01234567-vol-a",
	} {
		if got := volumeName(w, "c1", m, "0123456789abcdef"); got != want {
			t.Errorf("%s: %s, want %s", w, got, want)
		}
	}
	if got := randomHex(); len(got) != 16 {
		t.Errorf("random part %q", got)
	}
}

func TestWhatTravels(t *testing.T) {
	file := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name         string
		m            specs.Mount
		inGo, inRust bool
	}{
		{"folder", specs.Mount{Type: "bind", Source: "/var/lib", Destination: "/data"}, true, true},
		{"tmpfs", specs.Mount{Type: "tmpfs", Source: "tmpfs", Destination: "/data"}, false, false},
		{"shm", specs.Mount{Type: "bind", Source: "/run/shm", Destination: "/dev/shm"}, false, false},
		{"proc", specs.Mount{Type: "bind", Source: "/proc/self", Destination: "/x"}, false, false},
		{"sys", specs.Mount{Type: "bind", Source: "/sys/fs/cgroup", Destination: "/x"}, false, false},
		{"host device", specs.Mount{Type: "bind", Source: "/dev/null", Destination: "/x"}, false, true},
		{"onto a device of the host", specs.Mount{Type: "bind", Source: file, Destination: "/dev/null"}, true, false},
		{"file onto a new name in /dev", specs.Mount{Type: "bind", Source: file, Destination: "/dev/.helper"}, true, true},
	} {
		if got := travels(way.Go, c.m); got != c.inGo {
			t.Errorf("%s, Go: %v", c.name, got)
		}
		if got := travels(way.Rust, c.m); got != c.inRust {
			t.Errorf("%s, Rust: %v", c.name, got)
		}
	}
}

func TestMountsBelowUnescapesAndReverses(t *testing.T) {
	const mountinfo = `1 0 0:1 / / rw - ext4 /dev/vda rw
2 1 0:2 / /s/a rw - tmpfs t rw
3 2 0:3 / /s/a/with\040space rw - tmpfs t rw
4 1 0:4 / /sx rw - tmpfs t rw
`
	got, err := mountsBelow(strings.NewReader(mountinfo), "/s")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"/s/a/with space", "/s/a"}, got); diff != "" {
		t.Error(diff)
	}
}

// inOwnNamespace runs f with mounts of its own, shared as the shim's are.
func inOwnNamespace(t *testing.T, f func()) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounts need root")
	}
	err := thread.Do(func() error { // the namespace ends with the thread
		err := unix.Unshare(unix.CLONE_NEWNS)
		if err == nil {
			err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
		}
		if err == nil {
			err = unix.Mount("tmpfs", "/run", "tmpfs", 0, "")
		}
		if err == nil {
			err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, "")
		}
		if err == nil {
			f()
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestTheGuestSeesAReadOnlyShareWithWritableMountsInIt(t *testing.T) {
	for _, w := range []way.Way{way.Go, way.Rust} {
		t.Run(string(w), func(t *testing.T) {
			source := t.TempDir()
			inOwnNamespace(t, func() { checkShare(t, w, source) })
			if _, err := os.Stat(filepath.Join(source, "written")); err != nil {
				t.Errorf("what the guest wrote did not outlive the share: %v", err)
			}
		})
	}
}

func checkShare(t *testing.T, w way.Way, source string) {
	s, err := New(w, "sandbox")
	if err != nil {
		t.Error(err)
		return
	}
	mounts, err := s.Volumes("c1", []specs.Mount{
		{Type: "none", Source: source, Destination: "/rw", Options: []string{"rbind", "rw"}}, // as nerdctl writes it
		{Type: "tmpfs", Source: "shm", Destination: "/dev/shm"},
	})
	if err != nil {
		t.Error(err)
		return
	}
	inShare := func(guest string) string {
		return filepath.Join(s.Dir(), strings.TrimPrefix(guest, "/run/kata-containers/shared/containers"))
	}
	rw := inShare(mounts[0].Source)
	if err := os.WriteFile(filepath.Join(rw, "written"), nil, 0o600); err != nil {
		t.Errorf("a writable volume is not: %v", err)
	}
	if err := os.WriteFile(filepath.Join(s.shown, "x"), nil, 0o600); err == nil {
		t.Error("the share itself is writable")
	}
	if mounts[1].Source != "/run/kata-containers/sandbox/shm" || mounts[1].Type != "bind" {
		t.Errorf("/dev/shm became %+v", mounts[1])
	}
	ro, err := s.Volumes("c2", []specs.Mount{{Type: "bind", Source: filepath.Dir(source), Destination: "/ro", Options: []string{"rbind", "ro"}}})
	if err != nil {
		t.Error(err)
		return
	}
	if err := os.WriteFile(filepath.Join(inShare(ro[0].Source), "x"), nil, 0o600); err == nil {
		t.Error("a read-only volume is writable")
	}
	for _, cid := range []string{"c1", "c2"} {
		if err := s.Release(cid); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Stat(rw); !os.IsNotExist(err) {
		t.Errorf("%s is still there: %v", rw, err)
	}
	if err := s.Remove(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(s.root); !os.IsNotExist(err) {
		t.Errorf("%s is still there: %v", s.root, err)
	}
}
