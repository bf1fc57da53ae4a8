// SPDX-License-Identifier: Apache-2.0

package task

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
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

// onNode gives the node's directory of archives and its key, as they were when
// archived made it.
func onNode(dir string) option {
	return func(h *harness) { h.cfg.RestoreDir, h.cfg.SigningKey = dir, filepath.Join(dir, "key.pem") }
}

// archived makes a checkpoint of the container and an archive of that, of the
// name x.tar, in the directory of a new node.
func archived(t *testing.T, change func(*specs.Spec), options ...option) (dir string) {
	t.Helper()
	dir = t.TempDir()
	h := newHarness(t, append(options, onNode(dir))...)
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
	if err := os.WriteFile(filepath.Join(dir, "x.tar"), buf.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestRestoreByAnnotationOfThePod(t *testing.T) {
	h := newHarness(t, onNode(archived(t, podContainer())))
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
	next := newHarness(t, onNode(h.cfg.RestoreDir))
	next.cfg.StateDir = h.cfg.StateDir
	spec = readSpec(t, next.create(podContainer(restoreWeb, "x.tar")))
	if !slices.Equal(spec.Process.Args, []string{"sh", "-c", "work"}) {
		t.Errorf("the container that comes after it is to start %q", spec.Process.Args)
	}
	// Another pod's is restored.
	other := newHarness(t, onNode(h.cfg.RestoreDir))
	other.cfg.StateDir = h.cfg.StateDir
	spec = readSpec(t, other.create(podContainer(restoreWeb, "x.tar", "io.kubernetes.cri.sandbox-uid", "u-2")))
	if !slices.Equal(spec.Process.Args, []string{"/dev/.kata-checkpoint", "placeholder"}) {
		t.Errorf("another pod's is to start %q", spec.Process.Args)
	}
}

func TestFailedRestoreIsRepeated(t *testing.T) {
	h := newHarness(t, onNode(archived(t, podContainer())))
	h.create(podContainer(restoreWeb, "x.tar"))
	h.guest.Before("Restore", func(context.Context) error { return errors.New("CRIU says no") })
	if _, err := h.task.Start(t.Context(), &task.StartRequest{ID: "c1"}); err == nil {
		t.Fatal("restored")
	}
	next := newHarness(t, onNode(h.cfg.RestoreDir))
	next.cfg.StateDir = h.cfg.StateDir
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
	if err := errors.Join(os.WriteFile(filepath.Join(broken, "x.tar"), []byte("no archive"), 0o600), os.Symlink(filepath.Join(good, "x.tar"), filepath.Join(broken, "link.tar"))); err != nil {
		t.Fatal(err)
	}
	none := func(name, dir, namespace string) []string {
		return []string{"there is no archive " + name + " in " + dir + " on this node that a pod in the namespace \"" + namespace + "\" may be restored from: put it there, or name another one"}
	}
	alone := archived(t, nil)
	for name, tc := range map[string]struct {
		dir    string
		change func(*specs.Spec)
		want   []string
	}{
		"not there":               {good, podContainer(restoreWeb, "y.tar"), none("y.tar", good, "shop")},
		"outside":                 {good, podContainer(restoreWeb, "../x.tar"), []string{"not the name of an archive"}},
		"no archive":              {broken, podContainer(restoreWeb, "x.tar"), none("x.tar", broken, "shop")},
		"a link":                  {broken, podContainer(restoreWeb, "link.tar"), none("link.tar", broken, "shop")},
		"of another namespace":    {good, podContainer(restoreWeb, "x.tar", "io.kubernetes.cri.sandbox-namespace", "bank"), none("x.tar", good, "bank")},
		"of another container":    {good, func(s *specs.Spec) { podContainer(restoreWeb, "x.tar")(s); s.Process.Args = []string{"other"} }, []string{"does not fit this container"}},
		"of one without a pod":    {alone, podContainer(restoreWeb, "x.tar"), none("x.tar", alone, "shop")},
		"of one with a new mount": {good, func(s *specs.Spec) { podContainer(restoreWeb, "x.tar")(s); s.Mounts = s.Mounts[:1] }, []string{"lacks the mounts at /data"}},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHarness(t, onNode(tc.dir))
			_, err := h.task.Create(t.Context(), &task.CreateTaskRequest{ID: "c1", Bundle: h.bundle(tc.change)})
			wantError(t, err, append(tc.want, "restore container web as requested by annotation "+restoreWeb+" of its pod: ")...)
			h.wantCalls("Kata", h.kata.Calls())
			if exists(h.exchange()) {
				t.Error("the exchange directory is left")
			}
		})
	}
}

// What is unpacked of an archive is what the guest restores from: it takes its
// room once.
func TestAnArchiveTakesItsRoomOnce(t *testing.T) {
	archives := archived(t, podContainer())
	f, err := os.Open(filepath.Join(archives, "x.tar"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	files := 0
	for r := tar.NewReader(f); ; files++ {
		if _, err := r.Next(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	state := t.TempDir()
	// Each file takes an inode, and so do six directories and the marker.
	if err := unix.Mount("state", state, "tmpfs", 0, fmt.Sprintf("size=64m,nr_inodes=%d", files+7)); err != nil {
		t.Skip("needs to mount: ", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(state, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	h := newHarness(t, onNode(archives), func(h *harness) { h.cfg.StateDir, h.cfg.ReserveBytes = state, 0 })
	h.create(podContainer(restoreWeb, "x.tar"))
	found, err := filepath.Glob(filepath.Join(state, "exchange", "*", "[^.]*"))
	if err != nil || len(found) != 1 || filepath.Base(found[0]) != restoreDir {
		t.Errorf("there is %q, %v", found, err)
	}
}

// A pod learns nothing of the archives of other namespaces: neither whether there
// is one of a name, nor whose it is, nor by the room that it takes.
func TestForeignArchiveIsNotUnpacked(t *testing.T) {
	h := newHarness(t, onNode(archived(t, podContainer())))
	h.cfg.MaxImageBytes = 1 // which unpacking it would notice
	refusal := func(namespace, name string) string {
		change := podContainer(restoreWeb, name, "io.kubernetes.cri.sandbox-namespace", namespace)
		_, err := h.task.Create(t.Context(), &task.CreateTaskRequest{ID: "c1", Bundle: h.bundle(change)})
		if err == nil {
			t.Fatal("created")
		}
		return strings.ReplaceAll(err.Error(), name, "NAME")
	}
	if foreign, missing := refusal("bank", "x.tar"), refusal("bank", "y.tar"); foreign != missing {
		t.Errorf("of a foreign archive it says %q, and of one that is not there %q", foreign, missing)
	}
	if own := refusal("shop", "x.tar"); !strings.Contains(own, "larger than allowed") {
		t.Errorf("of its own it says %q", own)
	}
}

// The namespace rule holds for what the CRI hands in, too, as containerd 2.1 to
// 2.3 do for an archive or an image that is named in place of a pod's image.
func TestForeignImageSetInAPod(t *testing.T) {
	for name, tc := range map[string]struct {
		from, to func(*specs.Spec)
		ok       bool
	}{
		"its own namespace":            {podContainer(), podContainer(), true},
		"another one":                  {podContainer(), podContainer("io.kubernetes.cri.sandbox-namespace", "bank"), false},
		"of a container without a pod": {nil, podContainer(), false},
		"in a container without a pod": {podContainer(), nil, true},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			before := newHarness(t, onNode(dir))
			before.run(tc.from)
			path := t.TempDir()
			if err := before.checkpoint(path, nil); err != nil {
				t.Fatal(err)
			}
			h := newHarness(t, onNode(dir))
			_, err := h.task.Create(t.Context(), &task.CreateTaskRequest{ID: "c1", Bundle: h.bundle(tc.to), Checkpoint: path})
			if tc.ok {
				if err != nil {
					t.Error(err)
				}
				return
			}
			wantError(t, err, errForeign.Error())
			if strings.Contains(err.Error(), "shop") {
				t.Errorf("it says whose it is: %v", err)
			}
			h.wantCalls("Kata", h.kata.Calls())
		})
	}
}

// What was interrupted may have run: it is not done again without being asked.
func TestInterruptedRestoreIsNotRepeated(t *testing.T) {
	h := newHarness(t, onNode(archived(t, podContainer())))
	h.create(podContainer(restoreWeb, "x.tar"))
	record := filepath.Join(h.cfg.StateDir, restoredDir, "shop--u-1--web")
	h.guest.Before("Restore", func(context.Context) error {
		// As a host that stops now leaves it.
		next := newHarness(t, onNode(h.cfg.RestoreDir))
		next.cfg.StateDir = h.cfg.StateDir
		_, err := next.task.Create(t.Context(), &task.CreateTaskRequest{ID: "c1", Bundle: next.bundle(podContainer(restoreWeb, "x.tar"))})
		wantError(t, err, "was interrupted", "remove "+record)
		next.wantCalls("Kata", next.kata.Calls())
		return nil
	})
	if _, err := h.task.Start(t.Context(), &task.StartRequest{ID: "c1"}); err != nil {
		t.Fatal(err)
	}
	if content, err := os.ReadFile(record); err != nil || string(content) == intent {
		t.Errorf("the record has %q (%v)", content, err)
	}
}

// Where nothing can be recorded, nothing is restored.
func TestRestoreThatCannotBeRecorded(t *testing.T) {
	h := newHarness(t, onNode(archived(t, podContainer())))
	h.create(podContainer(restoreWeb, "x.tar"))
	if err := os.WriteFile(filepath.Join(h.cfg.StateDir, restoredDir), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := h.task.Start(t.Context(), &task.StartRequest{ID: "c1"})
	wantError(t, err, "restored")
	h.wantCalls("the agent", h.guest.Calls(), "Adopt c1", "CheckRestore c1")
}

// A record that seems old may have been written, or be looked at, while the clock
// was wrong.
func TestRecordsOfOldPods(t *testing.T) {
	h := newHarness(t, onNode(archived(t, podContainer())))
	dir := filepath.Join(h.cfg.StateDir, restoredDir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for name, age := range map[string]time.Duration{
		"shop--u-0--web": 3 * restoredFor, "shop--u-2--web": 2 * restoredFor, "shop--u-3--web": 4 * restoredFor, "shop--u-9--web": time.Hour,
	} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, time.Time{}, time.Now().Add(-age)); err != nil {
			t.Fatal(err)
		}
	}
	h.run(podContainer(restoreWeb, "x.tar"))
	all := []string{"shop--u-0--web", "shop--u-1--web", "shop--u-2--web", "shop--u-3--web", "shop--u-9--web"}
	wantFiles(t, dir, all...)
	for _, tc := range []struct {
		kept int
		want []string
	}{
		{3, []string{"shop--u-1--web", "shop--u-2--web", "shop--u-9--web"}},
		{0, []string{"shop--u-1--web", "shop--u-9--web"}},
	} {
		if err := removeOld(dir, tc.kept); err != nil {
			t.Fatal(err)
		}
		wantFiles(t, dir, tc.want...)
	}
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
