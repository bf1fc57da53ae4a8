// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/creds"
	criu_core "github.com/checkpoint-restore/go-criu/v7/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/pstree"
	"google.golang.org/protobuf/proto"
)

// image is the image of a process with credentials.
func image(t testing.TB, comm string, c *creds.CredsEntry) []byte {
	t.Helper()
	for _, id := range []**uint32{&c.Uid, &c.Gid, &c.Euid, &c.Egid, &c.Suid, &c.Sgid, &c.Fsuid, &c.Fsgid, &c.Secbits} {
		if *id == nil {
			*id = proto.Uint32(0)
		}
	}
	core := &criu_core.CoreEntry{Tc: &criu_core.TaskCoreEntry{Comm: &comm}, ThreadCore: &criu_core.ThreadCoreEntry{Creds: c}}
	message, err := proto.MarshalOptions{AllowPartial: true}.Marshal(core)
	if err != nil {
		t.Fatal(err)
	}
	data := binary.LittleEndian.AppendUint32(nil, imageMagic)
	data = binary.LittleEndian.AppendUint32(data, coreMagic)
	data = binary.LittleEndian.AppendUint32(data, uint32(len(message)))
	return append(data, message...)
}

// tree is the image of the processes of an image set, by PID, with their threads.
func tree(t testing.TB, processes map[uint32][]uint32) []byte {
	t.Helper()
	data := binary.LittleEndian.AppendUint32(nil, imageMagic)
	data = binary.LittleEndian.AppendUint32(data, pstreeMagic)
	for pid, threads := range processes {
		message, err := proto.Marshal(&pstree.PstreeEntry{Pid: &pid, Ppid: proto.Uint32(0), Pgid: &pid, Sid: &pid, Threads: threads})
		if err != nil {
			t.Fatal(err)
		}
		data = binary.LittleEndian.AppendUint32(data, uint32(len(message)))
		data = append(data, message...)
	}
	return data
}

func TestFilesThatAreNotImages(t *testing.T) {
	good := image(t, "work", &creds.CredsEntry{})
	for name, data := range map[string][]byte{"empty": nil, "text": []byte("this is no image at all"), "cut short": good[:len(good)-1], "another one's": append([]byte{1}, good[1:]...)} {
		dir := t.TempDir()
		if err := errors.Join(os.WriteFile(filepath.Join(dir, "core-1.img"), data, 0o600), os.WriteFile(filepath.Join(dir, "pstree.img"), tree(t, nil), 0o600)); err != nil {
			t.Fatal(err)
		}
		if err := checkCredentials(dir); err == nil || !strings.Contains(err.Error(), "core-1.img") {
			t.Errorf("%s: error %v", name, err)
		}
	}
}

// CRIU reads the credentials of a thread whose image has none from an image of an
// older format, where all may be set, and fails without a thread's state. Only a
// zombie needs neither.
func TestImagesWithoutCredentials(t *testing.T) {
	const alive = 1
	core := func(state *uint32, thread bool) []byte {
		c := &criu_core.CoreEntry{}
		if state != nil {
			c.Tc = &criu_core.TaskCoreEntry{TaskState: state, Comm: proto.String("work")}
		}
		if thread {
			c.ThreadCore = &criu_core.ThreadCoreEntry{}
		}
		message, err := proto.MarshalOptions{AllowPartial: true}.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		data := binary.LittleEndian.AppendUint32(nil, imageMagic)
		data = binary.LittleEndian.AppendUint32(data, coreMagic)
		data = binary.LittleEndian.AppendUint32(data, uint32(len(message)))
		return append(data, message...)
	}
	for name, tc := range map[string]struct {
		core []byte
		tree map[uint32][]uint32
		ok   bool
	}{
		"a zombie":                            {core(proto.Uint32(taskDead), false), map[uint32][]uint32{7: {7}}, true},
		"a process":                           {core(proto.Uint32(alive), true), map[uint32][]uint32{7: {7}}, false},
		"a process without its thread":        {core(proto.Uint32(alive), false), map[uint32][]uint32{7: {7}}, false},
		"a thread":                            {core(nil, true), map[uint32][]uint32{1: {1, 7}}, false},
		"a thread that claims to be a zombie": {core(proto.Uint32(taskDead), true), map[uint32][]uint32{1: {1, 7}}, false},
		"a main thread that claims to be a zombie": {core(proto.Uint32(taskDead), true), map[uint32][]uint32{7: {7, 8}}, false},
		"a zombie that is no process of the tree":  {core(proto.Uint32(taskDead), true), nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := errors.Join(os.WriteFile(filepath.Join(dir, "core-7.img"), tc.core, 0o600), os.WriteFile(filepath.Join(dir, "pstree.img"), tree(t, tc.tree), 0o600)); err != nil {
				t.Fatal(err)
			}
			err := checkCredentials(dir)
			if tc.ok && err != nil || !tc.ok && (err == nil || !strings.Contains(err.Error(), "core-7.img has no credentials")) {
				t.Errorf("error %v", err)
			}
		})
	}
}

// The agent must not be made to read what it has no memory for: the guest's OOM
// killer spares it.
func TestImagesAreBounded(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"core-1.img", "pstree.img", "files.img"} {
		if err := errors.Join(os.WriteFile(filepath.Join(dir, name), nil, 0o600), os.Truncate(filepath.Join(dir, name), 1<<40)); err != nil {
			t.Fatal(err)
		}
	}
	_, coreErr := readCore(filepath.Join(dir, "core-1.img"))
	_, treeErr := readTree(dir)
	_, filesErr := readEntries(filepath.Join(dir, "files.img"))
	for _, err := range []error{coreErr, treeErr, filesErr} {
		if err == nil || !strings.Contains(err.Error(), "is larger than") {
			t.Errorf("error %v", err)
		}
	}
}

func TestImagePIDs(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"core-8.img", "core-1234.img", "core-x.img", "mm-9.img", "inventory.img"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	pids, err := imagePIDs(dir)
	slices.Sort(pids)
	if err != nil || !slices.Equal(pids, []int{8, 1234}) {
		t.Errorf("%v (%v)", pids, err)
	}
}
