// SPDX-License-Identifier: Apache-2.0

package task

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// podContainer is the container web of a pod in the namespace shop, with more
// annotations, given as key and value in turns.
func podContainer(annotations ...string) func(*specs.Spec) {
	return func(s *specs.Spec) {
		maps.Copy(s.Annotations, map[string]string{
			"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "pod", "io.kubernetes.cri.container-name": "web",
			"io.kubernetes.cri.sandbox-namespace": "shop", "io.kubernetes.cri.sandbox-uid": "u-1",
		})
		for i := 0; i < len(annotations); i += 2 {
			s.Annotations[annotations[i]] = annotations[i+1]
		}
	}
}

const restoreWeb = "kata-checkpoint.dev/restore.web"

// archived makes a checkpoint of the container and an archive of that, of the name x.tar.
func archived(t *testing.T, change func(*specs.Spec), options ...option) (dir string) {
	t.Helper()
	h := newHarness(t, options...)
	h.run(change)
	path := t.TempDir()
	if err := h.checkpoint(path, nil); err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	entries, err := os.ReadDir(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		data, err := os.ReadFile(filepath.Join(path, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		if err := w.WriteHeader(&tar.Header{Name: "checkpoint/" + e.Name(), Typeflag: tar.TypeReg, Size: int64(len(data))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	dir = t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "x.tar"), buf.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestRestoreByAnnotationOfThePod(t *testing.T) {
	h := newHarness(t)
	h.cfg.RestoreDir = archived(t, podContainer())
	spec := readSpec(t, h.create(podContainer(restoreWeb, "x.tar")))
	if !slices.Equal(spec.Process.Args, []string{"/dev/.kata-checkpoint", "placeholder"}) {
		t.Errorf("Kata is to start %q", spec.Process.Args)
	}
	if exists(filepath.Join(h.exchange(), unpackDir)) {
		t.Error("the unpacked archive is left")
	}
	wantFiles(t, filepath.Join(h.exchange(), restoreDir), "inventory.img", "pages-1.img")
	if _, err := h.task.Start(t.Context(), &task.StartRequest{ID: "c1"}); err != nil {
		t.Fatal(err)
	}
	h.wantCalls("the agent", h.guest.Calls(), "Adopt c1", "CheckRestore c1", "Restore c1")

	// The next of the name begins afresh, in this sandbox and in another one of
	// the same pod.
	next := newHarness(t)
	next.cfg.StateDir, next.cfg.RestoreDir = h.cfg.StateDir, h.cfg.RestoreDir
	spec = readSpec(t, next.create(podContainer(restoreWeb, "x.tar")))
	if !slices.Equal(spec.Process.Args, []string{"sh", "-c", "work"}) {
		t.Errorf("the container that comes after it is to start %q", spec.Process.Args)
	}
	// Another pod's is restored.
	other := newHarness(t)
	other.cfg.StateDir, other.cfg.RestoreDir = h.cfg.StateDir, h.cfg.RestoreDir
	spec = readSpec(t, other.create(podContainer(restoreWeb, "x.tar", "io.kubernetes.cri.sandbox-uid", "u-2")))
	if !slices.Equal(spec.Process.Args, []string{"/dev/.kata-checkpoint", "placeholder"}) {
		t.Errorf("another pod's is to start %q", spec.Process.Args)
	}
}

func TestFailedRestoreIsRepeated(t *testing.T) {
	h := newHarness(t)
	h.cfg.RestoreDir = archived(t, podContainer())
	h.create(podContainer(restoreWeb, "x.tar"))
	h.guest.Before("Restore", func(context.Context) error { return errors.New("CRIU says no") })
	if _, err := h.task.Start(t.Context(), &task.StartRequest{ID: "c1"}); err == nil {
		t.Fatal("restored")
	}
	next := newHarness(t)
	next.cfg.StateDir, next.cfg.RestoreDir = h.cfg.StateDir, h.cfg.RestoreDir
	spec := readSpec(t, next.create(podContainer(restoreWeb, "x.tar")))
	if !slices.Equal(spec.Process.Args, []string{"/dev/.kata-checkpoint", "placeholder"}) {
		t.Errorf("after a restore that failed, Kata is to start %q", spec.Process.Args)
	}
}

func TestNoRestoreByAnnotation(t *testing.T) {
	for name, change := range map[string]func(*specs.Spec){
		"another container of the pod": podContainer("kata-checkpoint.dev/restore.db", "x.tar"),
		"an empty name":                podContainer(restoreWeb, ""),
		"a container without a pod":    func(s *specs.Spec) { s.Annotations[restoreWeb] = "x.tar" },
		"no name of a container":       func(s *specs.Spec) { s.Annotations["kata-checkpoint.dev/restore."] = "x.tar" },
	} {
		t.Run(name, func(t *testing.T) {
			h := newHarness(t)
			h.cfg.RestoreDir = t.TempDir() // where nothing could be found
			if spec := readSpec(t, h.create(change)); !slices.Equal(spec.Process.Args, []string{"sh", "-c", "work"}) {
				t.Errorf("Kata is to start %q", spec.Process.Args)
			}
		})
	}
}

func TestRefusedArchives(t *testing.T) {
	good := archived(t, podContainer())
	broken := t.TempDir()
	if err := os.WriteFile(filepath.Join(broken, "x.tar"), []byte("no archive"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		dir    string
		change func(*specs.Spec)
		want   []string
	}{
		"not there":               {good, podContainer(restoreWeb, "y.tar"), []string{"there is no archive y.tar in " + good, "put it there"}},
		"outside":                 {good, podContainer(restoreWeb, "../x.tar"), []string{"not the name of an archive"}},
		"no archive":              {broken, podContainer(restoreWeb, "x.tar"), []string{"archive x.tar"}},
		"of another namespace":    {good, podContainer(restoreWeb, "x.tar", "io.kubernetes.cri.sandbox-namespace", "bank"), []string{`of the namespace "shop"`, `"bank"`}},
		"of another container":    {good, func(s *specs.Spec) { podContainer(restoreWeb, "x.tar")(s); s.Process.Args = []string{"other"} }, []string{"does not fit this container"}},
		"of one without a pod":    {archived(t, nil), podContainer(restoreWeb, "x.tar"), []string{`of the namespace ""`}},
		"of one with a new mount": {good, func(s *specs.Spec) { podContainer(restoreWeb, "x.tar")(s); s.Mounts = s.Mounts[:1] }, []string{"lacks the mounts at /data"}},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHarness(t)
			h.cfg.RestoreDir = tc.dir
			_, err := h.task.Create(t.Context(), &task.CreateTaskRequest{ID: "c1", Bundle: h.bundle(tc.change)})
			wantError(t, err, append(tc.want, "restore container web as requested by annotation "+restoreWeb+" of its pod: ")...)
			h.wantCalls("Kata", h.kata.Calls())
			if exists(h.exchange()) {
				t.Error("the exchange directory is left")
			}
		})
	}
}

func TestRecordsOfOldPodsAreRemoved(t *testing.T) {
	h := newHarness(t)
	h.cfg.RestoreDir = archived(t, podContainer())
	dir := filepath.Join(h.cfg.StateDir, restoredDir)
	old, recent := filepath.Join(dir, "shop--u-0--web"), filepath.Join(dir, "shop--u-9--web")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for path, age := range map[string]time.Duration{old: 2 * restoredFor, recent: time.Hour} {
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, time.Time{}, time.Now().Add(-age)); err != nil {
			t.Fatal(err)
		}
	}
	h.run(podContainer(restoreWeb, "x.tar"))
	wantFiles(t, dir, "shop--u-1--web", "shop--u-9--web")
}

func TestOtherImage(t *testing.T) {
	for _, tc := range []struct {
		a, b  string
		other bool
	}{
		{"busybox:1", "busybox:1", false}, {"busybox:1", "busybox:2", true}, {"sha256:1", "sha256:2", true}, {"sha256:1", "sha256:1", false},
		{"busybox:1", "sha256:1", false}, {"", "busybox:1", false}, {"sha256:1", "", false},
	} {
		if otherImage(tc.a, tc.b) != tc.other || otherImage(tc.b, tc.a) != tc.other {
			t.Errorf("%q and %q: %t", tc.a, tc.b, !tc.other)
		}
	}
}
