// SPDX-License-Identifier: Apache-2.0

package bundle

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/adjust"
	"github.com/kata-checkpoint/kata-checkpoint/plugin/internal/kata"
)

func wantError(t *testing.T, err error, part string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), part) {
		t.Errorf("error %v lacks %q", err, part)
	}
}

func write(t *testing.T, dir, spec string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(spec), 0o640); err != nil {
		t.Fatal(err)
	}
}

// What is edited is edited, and nothing else: a later OCI spec has fields that
// this build does not know, and they are Kata's to read.
func TestEditsKeepTheRest(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, `{
		"ociVersion": "9.9", "newThing": {"a": 12345678901234567890},
		"process": {"args": ["sh", "-c", "a<b&c"], "cwd": "/w", "user": {"uid": 5}, "newField": [1.50]},
		"mounts": [{"destination": "/x", "newFlag": true}],
		"annotations": {"k": "<v>"}
	}`)
	s, err := ReadSpec(dir)
	if err != nil {
		t.Fatal(err)
	}
	err = errors.Join(
		s.Adjust(&adjust.Adjustment{Mounts: []specs.Mount{{Destination: "/m", Source: "/s"}}, Annotations: map[string]string{"a": "b"}}),
		s.AddMount(specs.Mount{Destination: "/n"}),
		s.SetProcess(map[string]any{"args": []string{"/p"}, "cwd": nil}),
		s.Write(),
	)
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(dir, "config.json"))
	if err != nil {
		t.Fatal(err)
	}
	var got, want any
	if err := json.Unmarshal(data, &got); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal([]byte(`{
		"ociVersion": "9.9", "newThing": {"a": 12345678901234567890},
		"process": {"args": ["/p"], "user": {"uid": 5}, "newField": [1.50]},
		"mounts": [{"destination": "/x", "newFlag": true}, {"destination": "/m", "source": "/s"}, {"destination": "/n"}],
		"annotations": {"k": "<v>", "a": "b"}
	}`), &want); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	for _, raw := range []string{"12345678901234567890", "1.50", "<v>"} {
		if !strings.Contains(string(data), raw) {
			t.Errorf("%s was not kept as it was: %s", raw, data)
		}
	}
	if st, err := os.Stat(filepath.Join(dir, "config.json")); err != nil || st.Mode().Perm() != 0o640 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("left over: %v, %v", entries, err)
	}
	if len(s.Mounts) != 3 || s.Process.Args[0] != "/p" || s.Annotations["a"] != "b" {
		t.Errorf("what is read afterwards: %+v", s.Spec)
	}
}

func TestOwnPIDNamespace(t *testing.T) {
	for name, tc := range map[string]struct{ linux, want string }{
		"shared":  {`{"new": 1, "namespaces": [{"type": "mount"}, {"type": "pid", "path": "/proc/7/ns/pid"}, {"type": "network", "path": "/n"}]}`, `{"new":1,"namespaces":[{"type":"mount"},{"type":"network","path":"/n"},{"type":"pid"}]}`},
		"its own": {`{"namespaces": [{"type": "pid"}, {"type": "mount"}]}`, `{"namespaces":[{"type":"pid"},{"type":"mount"}]}`},
		"none":    {`{"namespaces": []}`, `{"namespaces":[]}`},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			write(t, dir, `{"linux": `+tc.linux+`}`)
			s, err := ReadSpec(dir)
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(s.OwnPIDNamespace(), s.Write()); err != nil {
				t.Fatal(err)
			}
			data, err := os.ReadFile(filepath.Join(dir, "config.json"))
			if err != nil {
				t.Fatal(err)
			}
			var got, want any
			if err := errors.Join(json.Unmarshal(data, &got), json.Unmarshal([]byte(`{"linux": `+tc.want+`}`), &want)); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

func TestAdjustOfABareSpec(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, `{}`)
	s, err := ReadSpec(dir)
	if err != nil {
		t.Fatal(err)
	}
	a := &adjust.Adjustment{Mounts: []specs.Mount{{Destination: "/m"}}, Annotations: map[string]string{"a": "b"}}
	if err := errors.Join(s.Adjust(a), s.SetProcess(map[string]any{"cwd": "/"}), s.Write()); err != nil {
		t.Fatal(err)
	}
	again, err := ReadSpec(dir)
	if err != nil || len(again.Mounts) != 1 || again.Annotations["a"] != "b" || again.Process.Cwd != "/" {
		t.Errorf("got %+v, %v", again, err)
	}
}

func TestReadSpecRefuses(t *testing.T) {
	dir := t.TempDir()
	_, err := ReadSpec(dir)
	wantError(t, err, "has no config.json")
	for _, spec := range []string{"", "{", "null", "[]", `"x"`, `{"mounts": 7}`} {
		write(t, dir, spec)
		_, err := ReadSpec(dir)
		wantError(t, err, "is not an OCI runtime spec")
	}
}

func TestRecord(t *testing.T) {
	dir := t.TempDir()
	if _, err := ReadRecord(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v", err)
	}
	want := &Record{Sandbox: "s", Downstream: kata.Endpoint{Address: "unix:///x", Version: 2}, Address: "unix:///y", PID: 7, StartTime: 1 << 60}
	if err := want.Write(dir); err != nil {
		t.Fatal(err)
	}
	got, err := ReadRecord(dir)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if err := errors.Join(RemoveRecord(dir), RemoveRecord(dir)); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(filepath.Join(dir, RecordName), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = ReadRecord(dir)
	wantError(t, err, RecordName)
}

func TestUnfinished(t *testing.T) {
	state, images := t.TempDir(), t.TempDir()
	set := func(path string) error { return SetUnfinished(state, "ns", "c1", path) }
	removed := func() error { return RemoveUnfinished(state, "ns", "c1") }
	unfinished := filepath.Join(images, ".kata-checkpoint-0123456789abcdef")
	if err := os.Mkdir(unfinished, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := removed(); err != nil {
		t.Errorf("without a note: %v", err)
	}
	if err := errors.Join(set(filepath.Join(images, "earlier")), set(unfinished), removed()); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(unfinished); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the unfinished image set is left: %v", err)
	}
	// The note is in a directory of root's, and yet: it names nothing else.
	if err := set(images); err != nil {
		t.Fatal(err)
	}
	wantError(t, removed(), "not an unfinished image set")
	if _, err := os.Stat(images); err != nil {
		t.Error(err)
	}
	if err := errors.Join(set(""), set(""), removed()); err != nil {
		t.Error(err)
	}
}

func TestCRIWorkPath(t *testing.T) {
	dir, root := t.TempDir(), t.TempDir()
	if got := CRIWorkPath(dir); got != "" {
		t.Errorf("without a link: %q", got)
	}
	if err := os.Symlink(filepath.Join(root, "io.containerd.runtime.v2.task/k8s.io/c1"), filepath.Join(dir, "work")); err != nil {
		t.Fatal(err)
	}
	if got := CRIWorkPath(dir); got != "" {
		t.Errorf("not the CRI's: %q", got)
	}
	container := filepath.Join(root, "io.containerd.grpc.v1.cri/containers/c1")
	if err := os.MkdirAll(container, 0o700); err != nil {
		t.Fatal(err)
	}
	if got := CRIWorkPath(dir); got != container {
		t.Errorf("older versions: %q", got)
	}
	fresh := filepath.Join(container, "ctrd-checkpoint")
	if err := os.Mkdir(fresh, 0o700); err != nil {
		t.Fatal(err)
	}
	if got := CRIWorkPath(dir); got != fresh {
		t.Errorf("newer versions: %q", got)
	}
}

func TestEmptyRootfs(t *testing.T) {
	dir := t.TempDir()
	if err := EmptyRootfs(dir); err != nil {
		t.Errorf("without a rootfs: %v", err)
	}
	rootfs := filepath.Join(dir, "rootfs")
	if err := os.MkdirAll(filepath.Join(rootfs, "etc/deep"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(rootfs, "etc/added"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 {
		// Somebody else's files: they are left alone, and all else with them.
		below := filepath.Join(rootfs, "etc/deep")
		if err := unix.Mount(t.TempDir(), below, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
		kept := filepath.Join(below, "kept")
		err := os.WriteFile(kept, nil, 0o600)
		if err == nil {
			err = EmptyRootfs(dir)
		}
		_, statErr := os.Stat(kept)
		if err := errors.Join(err, statErr, unix.Unmount(below, unix.MNT_DETACH)); err != nil {
			t.Fatal(err)
		}
	}
	if err := EmptyRootfs(dir); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(rootfs); err != nil || len(left) > 0 {
		t.Errorf("left: %v (%v)", left, err)
	}
}
