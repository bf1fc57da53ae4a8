// SPDX-License-Identifier: Apache-2.0

// Package teststore makes checkpoints for tests: with images that CRIU could
// have written, as far as this project reads them, a signed manifest, and all
// files that the store has beside them.
package teststore

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	criu_core "github.com/checkpoint-restore/go-criu/v7/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/pstree"
	"github.com/checkpoint-restore/go-criu/v7/stats"
	"google.golang.org/protobuf/proto"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
	"github.com/kata-checkpoint/kata-checkpoint/internal/signing"
	"github.com/kata-checkpoint/kata-checkpoint/internal/store"
)

// Process is one of a checkpoint's.
type Process struct {
	PID, Parent uint32
	Name        string
}

// Processes are those of a checkpoint that names none.
var Processes = []Process{{1, 0, "init"}, {7, 1, "worker"}, {9, 7, "child"}, {8, 1, "logger"}}

// Image is an image of CRIU with messages.
func Image(t testing.TB, first, second uint32, messages ...proto.Message) []byte {
	t.Helper()
	out := binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, first), second)
	for _, m := range messages {
		data, err := proto.MarshalOptions{AllowPartial: true}.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		out = append(binary.LittleEndian.AppendUint32(out, uint32(len(data))), data...) //nolint:gosec // a test's
	}
	return out
}

// Images are the files of an image set with these processes and memory.
func Images(t testing.TB, processes []Process, memory string) map[string][]byte {
	t.Helper()
	files := map[string][]byte{imageset.InventoryName: []byte("inventory"), "pages-1.img": []byte(memory)}
	var tree []proto.Message
	for _, p := range processes {
		tree = append(tree, &pstree.PstreeEntry{Pid: proto.Uint32(p.PID), Ppid: proto.Uint32(p.Parent), Threads: []uint32{p.PID}})
		files[fmt.Sprintf("core-%d.img", p.PID)] = Image(t, 0x54564319, 0x55053847, &criu_core.CoreEntry{Tc: &criu_core.TaskCoreEntry{Comm: proto.String(p.Name), TaskState: proto.Uint32(1)}})
	}
	files["pstree.img"] = Image(t, 0x54564319, 0x50273030, tree...)
	return files
}

// Stats is the content of stats-dump.
func Stats(t testing.TB) []byte {
	t.Helper()
	return Image(t, 0x55105940, 0x57093306, &stats.StatsEntry{Dump: &stats.DumpStatsEntry{
		FreezingTime: proto.Uint32(1), FrozenTime: proto.Uint32(2), MemdumpTime: proto.Uint32(3), MemwriteTime: proto.Uint32(4),
		PagesScanned: proto.Uint64(5), PagesWritten: proto.Uint64(6),
	}})
}

// Dir is a directory that belongs to this user only.
func Dir(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

// Checkpoint describes one.
type Checkpoint struct {
	Name   string
	Record store.Record
	Memory string
	// Rootfs are the changed files of the root file system.
	Rootfs    map[string]string
	Processes []Process
	Key       *signing.Key
}

// Add puts a checkpoint into a store.
func Add(t testing.TB, s *store.Store, c Checkpoint) *store.Checkpoint {
	t.Helper()
	if c.Processes == nil {
		c.Processes = Processes
	}
	draft, err := s.Begin(c.Name)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := draft.Abort(); err != nil {
			t.Error(err)
		}
	}()
	WriteImages(t, draft.Images(), Images(t, c.Processes, c.Memory), c.Record, c.Key)
	for name, content := range map[string][]byte{
		store.SpecName: []byte(`{"ociVersion": "1.2.0"}`), store.ConfigName: []byte(`{"id": "id", "name": "name"}`), store.StatusName: []byte("{}"),
		imageset.StatsName: Stats(t), imageset.RootfsDiffName: tarOf(t, c.Rootfs),
	} {
		if err := os.WriteFile(draft.File(name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if c.Record.Created.IsZero() {
		c.Record.Created = time.Now()
	}
	if err := draft.Commit(t.Context(), &c.Record); err != nil {
		t.Fatal(err)
	}
	out, err := s.Open(c.Name)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// WriteImages writes an image set into an empty directory.
func WriteImages(t testing.TB, dir string, files map[string][]byte, r store.Record, key *signing.Key) {
	t.Helper()
	target, err := imageset.NewTarget(dir)
	if err != nil {
		t.Fatal(err)
	}
	m := &imageset.Manifest{
		Created:   time.Now().UTC(),
		Container: imageset.Container{ID: r.Container, Namespace: r.Namespace, Args: []string{"init", "--run"}, Hostname: "host"},
		Guest:     imageset.Guest{Kernel: "6.12", CRIUVersion: 40200},
		Phases:    []imageset.Phase{{Name: "freeze", Duration: time.Second}, {Name: "dump", Duration: 3 * time.Second}},
	}
	if r.Pod != nil {
		m.Container.PodNamespace = r.Pod.Namespace
	}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(target.Dir().Name(), name), content, 0o600); err != nil {
			t.Fatal(err)
		}
		file, err := imageset.Describe(t.Context(), name, bytes.NewReader(content))
		if err != nil {
			t.Fatal(err)
		}
		m.Files = append(m.Files, file)
	}
	if err := errclass.Join(target.Commit(t.Context(), m, key), target.Abort()); err != nil {
		t.Fatal(err)
	}
}

func tarOf(t testing.TB, files map[string]string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for name, content := range files {
		if err := w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(content))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}
