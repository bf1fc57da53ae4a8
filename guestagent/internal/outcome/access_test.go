// SPDX-License-Identifier: Apache-2.0

package outcome

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moby/sys/capability"
	"golang.org/x/sys/unix"
)

func TestAccess(t *testing.T) {
	for name, tc := range map[string]struct {
		rights rights
		file   file
		want   uint16
		ok     bool
	}{
		"one for all":               {rights{}, file{mode: 0o644, uid: 7}, readable, true},
		"writing that":              {rights{uid: 1}, file{mode: 0o644, uid: 7}, writable, false},
		"the owner's":               {rights{uid: 7}, file{mode: 0o400, uid: 7}, writable, true},
		"the group's":               {rights{uid: 1, gid: 8}, file{mode: 0o060, uid: 7, gid: 8}, writable, true},
		"an additional group's":     {rights{uid: 1, gid: 2, groups: []uint32{3, 8}}, file{mode: 0o040, uid: 7, gid: 8}, readable, true},
		"another group's":           {rights{uid: 1, gid: 2}, file{mode: 0o060, uid: 7, gid: 8}, readable, false},
		"root's, of root without":   {rights{uid: 0}, file{mode: 0o600, uid: 7}, readable, false},
		"by CAP_DAC_OVERRIDE":       {rights{bounding: caps(capability.CAP_DAC_OVERRIDE)}, file{mode: 0, uid: 7}, writable, true},
		"by CAP_SETUID":             {rights{bounding: caps(capability.CAP_SETUID)}, file{mode: 0, uid: 7}, writable, true},
		"by CAP_DAC_READ_SEARCH":    {rights{uid: 1, bounding: caps(capability.CAP_DAC_READ_SEARCH)}, file{mode: 0, uid: 7}, readable, true},
		"writing by that":           {rights{uid: 1, bounding: caps(capability.CAP_DAC_READ_SEARCH)}, file{mode: 0, uid: 7}, writable, false},
		"a program to be mapped":    {rights{uid: 1}, file{mode: 0o711, uid: 7}, readable | executable, true},
		"a capability that is lost": {rights{uid: 1, noNewPrivs: true, bounding: caps(capability.CAP_DAC_OVERRIDE)}, file{mode: 0o600, uid: 7}, readable, false},
	} {
		t.Run(name, func(t *testing.T) {
			k := &check{Container: &Container{rights: tc.rights}, programs: &programs{}}
			if err := k.access(os.Getpid(), "it", "/dev/null", tc.file, tc.want); err != nil {
				t.Fatal(err)
			}
			if ok := len(k.findings()) == 0; ok != tc.ok {
				t.Errorf("findings %q", k.findings())
			}
		})
	}
}

// A container that can never be root has no file open that only root can open.
func TestOpenFiles(t *testing.T) {
	dir := t.TempDir()
	secret := filepath.Join(dir, "secret")
	if err := os.WriteFile(secret, []byte("secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	k, pid := holder(t, "exec 3<"+secret+" 4>>"+secret+" 5</etc/passwd 6</dev/null", 0)
	k.rights.uid = 1000
	k.devices = map[deviceNode]bool{{unix.S_IFCHR, unix.Mkdev(1, 3)}: true}
	if err := k.files(pid); err != nil {
		t.Fatal(err)
	}
	var have []string
	for _, f := range k.findings() {
		if strings.Contains(f, "secret") {
			have = append(have, f)
		}
	}
	if len(have) != 2 || len(k.findings()) != 2 || !strings.Contains(have[0], "has the descriptor 3 (") || !strings.Contains(have[1], "which is the user 0's and has the mode 0600: the container cannot open it") {
		t.Errorf("findings %q", k.findings())
	}
	k, pid = holder(t, "exec 6</dev/zero", 0)
	if err := k.files(pid); err != nil {
		t.Fatal(err)
	}
	if len(k.findings()) != 1 || !strings.Contains(k.findings()[0], "the device 1:5, of which the container has no node") {
		t.Errorf("findings %q", k.findings())
	}
	k, pid = holder(t, "exec 6</dev/zero", caps(capability.CAP_MKNOD))
	if err := k.files(pid); err != nil || len(k.findings()) > 0 {
		t.Errorf("findings %q, %v", k.findings(), err)
	}
}

// What CRIU puts into a tmpfs is no way to a device, and no way to another user.
func TestContents(t *testing.T) {
	script := func(options string) string {
		return "mount -t tmpfs -o '" + options + "' made /mnt && mkdir -p /mnt/sub/deep && mknod /mnt/sub/deep/disk b 254 0 && mknod /mnt/null c 1 3 && " +
			"mknod /mnt/tty c 5 0 && cp /bin/true /mnt/sub/true && chmod 4755 /mnt/sub/true && mount -t tmpfs over /mnt/sub"
	}
	device, program := "has a node of the device 254:0 in /mnt, and the container has none", `has a set-user-ID program, "sub/true" in /mnt, and the container has none`
	for name, tc := range map[string]struct {
		options string
		rights  rights
		want    []string
	}{
		"both":                  {"mode=755", rights{uid: 1000}, []string{device, program}},
		"no devices":            {"nodev", rights{uid: 1000}, []string{program}},
		"no set-user-ID":        {"nosuid", rights{uid: 1000}, []string{device}},
		"the user's own":        {"nodev", rights{uid: 0}, nil},
		"no_new_privs":          {"nodev", rights{uid: 1000, noNewPrivs: true}, nil},
		"CAP_SETUID, CAP_MKNOD": {"mode=755", rights{uid: 1000, bounding: caps(capability.CAP_MKNOD, capability.CAP_SETUID)}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			k, pid := holder(t, script(tc.options), 0)
			k.rights, k.programs = tc.rights, &programs{}
			k.devices = map[deviceNode]bool{{unix.S_IFCHR, unix.Mkdev(1, 3)}: true}
			mounts, err := readMounts(pid)
			if err != nil {
				t.Fatal(err)
			}
			own, err := readMounts(os.Getpid())
			if err != nil {
				t.Fatal(err)
			}
			c := &comparison{have: mounts, may: mounts, guest: own.devices()}
			if err := k.contents(pid, c); err != nil {
				t.Fatal(err)
			}
			if len(k.findings()) != len(tc.want) {
				t.Fatalf("findings %q, want %q", k.findings(), tc.want)
			}
			for i, f := range k.findings() {
				if !strings.Contains(f, tc.want[i]) {
					t.Errorf("finding %q lacks %q", f, tc.want[i])
				}
			}
			nodes, err := c.readDevices(pid)
			if err != nil || !nodes[deviceNode{unix.S_IFBLK, unix.Mkdev(254, 0)}] || !nodes[deviceNode{unix.S_IFCHR, unix.Mkdev(1, 3)}] || len(nodes) != 3 {
				t.Errorf("nodes %v, %v", nodes, err)
			}
		})
	}
}
