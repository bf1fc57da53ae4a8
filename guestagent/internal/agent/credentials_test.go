// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/creds"
	criu_core "github.com/checkpoint-restore/go-criu/v7/crit/images/criu-core"
	"google.golang.org/protobuf/proto"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
)

// image is the image of a process with credentials.
func image(t *testing.T, comm string, c *creds.CredsEntry) []byte {
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

func TestCredentials(t *testing.T) {
	const chown, sysAdmin = 1 << 0, 1 << 21
	plain := &creds.CredsEntry{CapBnd: []uint32{chown, 0}, CapEff: []uint32{chown, 0}}
	user := func(id uint32) *creds.CredsEntry {
		return &creds.CredsEntry{Uid: &id, Euid: &id, Suid: &id, Fsuid: &id}
	}
	asUser := &api.Rights{NoNewPrivs: true, Uid: 1000}
	for name, tc := range map[string]struct {
		creds  *creds.CredsEntry
		rights *api.Rights
		err    string
	}{
		"as much as the container":         {plain, &api.Rights{Capabilities: []string{"CAP_CHOWN"}}, ""},
		"less":                             {plain, &api.Rights{Capabilities: []string{"CAP_KILL", "cap_chown"}}, ""},
		"more":                             {plain, &api.Rights{Capabilities: []string{"CAP_KILL"}}, "the process work has CAP_CHOWN"},
		"more in one set":                  {&creds.CredsEntry{CapPrm: []uint32{sysAdmin, 0}}, &api.Rights{Capabilities: []string{"CAP_CHOWN"}}, "CAP_SYS_ADMIN"},
		"more of the upper half":           {&creds.CredsEntry{CapBnd: []uint32{0, 1 << 7}}, &api.Rights{}, "CAP_BPF"},
		"what nobody knows":                {&creds.CredsEntry{CapInh: []uint32{0, 1 << 31}}, &api.Rights{}, "0x8000000000000000"},
		"nothing is bound":                 {plain, nil, ""},
		"the container's user":             {user(1000), asUser, ""},
		"another user, no new privileges":  {user(0), asUser, "another user (0)"},
		"another user, who may become one": {user(0), &api.Rights{Uid: 1000}, ""},
		"one that root became":             {user(33), &api.Rights{NoNewPrivs: true}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			for file, data := range map[string][]byte{"core-1.img": image(t, "work", tc.creds), "pages-1.img": []byte("x"), "inventory.img": []byte("y")} {
				if err := os.WriteFile(filepath.Join(dir, file), data, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			err := checkCredentials(dir, tc.rights)
			if tc.err == "" && err != nil || tc.err != "" && (err == nil || !strings.Contains(err.Error(), tc.err)) {
				t.Errorf("error %v, want %q", err, tc.err)
			}
		})
	}
}

func TestFilesThatAreNotImages(t *testing.T) {
	good := image(t, "work", &creds.CredsEntry{})
	for name, data := range map[string][]byte{"empty": nil, "text": []byte("this is no image at all"), "cut short": good[:len(good)-1], "another one's": append([]byte{1}, good[1:]...)} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "core-1.img"), data, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := checkCredentials(dir, &api.Rights{}); err == nil || !strings.Contains(err.Error(), "core-1.img") {
			t.Errorf("%s: error %v", name, err)
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
