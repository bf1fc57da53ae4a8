// SPDX-License-Identifier: Apache-2.0

package outcome

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/moby/sys/capability"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/testproc"
)

func caps(list ...capability.Cap) (s set) {
	for _, c := range list {
		s |= 1 << c
	}
	return s
}

var usual = []string{"CAP_CHOWN", "CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP", "CAP_NET_RAW"}

// rootRights are those of root in a container, userRights those of a user to whom
// the specification gives the same sets, as engines do.
func rootRights(noNewPrivs bool) *api.Rights {
	return &api.Rights{Capabilities: usual, Permitted: usual, NoNewPrivs: noNewPrivs}
}

func userRights(noNewPrivs bool) *api.Rights {
	r := rootRights(noNewPrivs)
	r.Uid, r.Gid, r.Groups = 1000, 1001, []uint32{50}
	return r
}

func TestCredentials(t *testing.T) {
	all := setOf(usual)
	user := credentials{uids: []uint32{1000, 1000, 1000, 1000}, gids: []uint32{1001, 1001, 1001, 1001}, groups: []uint32{50}, bounding: all, noNewPrivs: true}
	root := credentials{uids: make([]uint32, 4), gids: make([]uint32, 4), bounding: all, permitted: all, effective: all, noNewPrivs: true}
	with := func(c credentials, change func(*credentials)) credentials {
		change(&c)
		return c
	}
	for name, tc := range map[string]struct {
		rights      *api.Rights
		placeholder credentials
		have        credentials
		programs    programs
		want        []string
	}{
		"a user like the container's": {userRights(true), credentials{noNewPrivs: true}, user, programs{}, nil},
		"root like the container's":   {rootRights(true), credentials{noNewPrivs: true}, root, programs{}, nil},
		"less":                        {rootRights(true), credentials{noNewPrivs: true}, with(user, func(c *credentials) { c.bounding = 0 }), programs{}, nil},
		"a capability that nobody has": {
			rootRights(false), credentials{},
			with(root, func(c *credentials) { c.effective |= caps(capability.CAP_SYS_ADMIN) }), programs{},
			[]string{"has the capability CAP_SYS_ADMIN, which the container does not"},
		},
		"several": {
			rootRights(false), credentials{},
			with(root, func(c *credentials) { c.permitted |= caps(capability.CAP_SYS_ADMIN, capability.CAP_BPF) | 1<<63 }), programs{},
			[]string{"has the capabilities CAP_SYS_ADMIN, CAP_BPF, 63, which the container does not"},
		},
		"a larger bounding set": {
			rootRights(true), credentials{},
			with(root, func(c *credentials) { c.bounding |= caps(capability.CAP_BPF) }), programs{},
			[]string{"has the capability CAP_BPF in its bounding set, which"},
		},
		"what a set-user-ID program would give, and may": {userRights(false), credentials{}, with(user, func(c *credentials) { c.effective = all }), programs{}, nil},
		"what a set-user-ID program would give, and may not": {
			userRights(true), credentials{},
			with(user, func(c *credentials) { c.effective = caps(capability.CAP_SETUID) }), programs{},
			[]string{"has the capability CAP_SETUID, which"},
		},
		"what the program's file gives": {
			userRights(true), credentials{},
			with(user, func(c *credentials) { c.effective = caps(capability.CAP_NET_RAW) }), programs{capabilities: caps(capability.CAP_NET_RAW, capability.CAP_BPF)}, nil,
		},
		"what the program's file gives, and the container does not": {
			userRights(true), credentials{},
			with(user, func(c *credentials) { c.effective = caps(capability.CAP_BPF) }), programs{capabilities: caps(capability.CAP_NET_RAW, capability.CAP_BPF)},
			[]string{"has the capability CAP_BPF, which"},
		},
		"ambient ones of the specification": {
			&api.Rights{Capabilities: usual, Permitted: usual, Ambient: usual, Inheritable: usual, NoNewPrivs: true, Uid: 1000, Gid: 1001, Groups: []uint32{50}}, credentials{},
			with(user, func(c *credentials) { c.ambient, c.inheritable, c.permitted = all, all, all }), programs{}, nil,
		},
		"inheritable ones that root may add": {rootRights(true), credentials{}, with(root, func(c *credentials) { c.inheritable = all }), programs{}, nil},
		"inheritable ones that nobody may add": {
			userRights(true), credentials{},
			with(user, func(c *credentials) { c.inheritable = caps(capability.CAP_CHOWN) }), programs{},
			[]string{"has the capability CAP_CHOWN in its inheritable set, which"},
		},
		"another user that root became": {rootRights(true), credentials{}, user, programs{}, nil},
		"another user": {
			userRights(true), credentials{}, with(user, func(c *credentials) { c.uids = []uint32{1000, 0, 1000, 0} }), programs{users: []uint32{0}},
			[]string{"has the user 0, which the container cannot become"},
		},
		"another user, by CAP_SETUID": {userRights(false), credentials{}, with(user, func(c *credentials) { c.uids = make([]uint32, 4) }), programs{}, nil},
		"another user, without any": {
			&api.Rights{Uid: 1000, Gid: 1001, Groups: []uint32{50}}, credentials{},
			with(user, func(c *credentials) { c.uids, c.bounding = []uint32{1000, 0, 1000, 0}, 0 }), programs{},
			[]string{"has the user 0, which"},
		},
		"another user, by a set-user-ID program without any": {
			&api.Rights{Uid: 1000, Gid: 1001, Groups: []uint32{50}}, credentials{},
			with(user, func(c *credentials) { c.uids, c.bounding = []uint32{1000, 7, 7, 7}, 0 }), programs{users: []uint32{7}}, nil,
		},
		"another group": {
			userRights(true), credentials{}, with(user, func(c *credentials) { c.gids = []uint32{1001, 6, 1001, 6} }), programs{},
			[]string{"has the group 6, which the container cannot become"},
		},
		"an additional group": {
			userRights(true), credentials{}, with(user, func(c *credentials) { c.groups = []uint32{0, 50} }), programs{},
			[]string{"has the group 0, which"},
		},
		"groups that Kata gives": {
			&api.Rights{NoNewPrivs: true}, credentials{groups: []uint32{0, 20}},
			with(root, func(c *credentials) {
				c.groups, c.bounding, c.effective, c.permitted = []uint32{20}, 0, 0, 0
			}), programs{}, nil,
		},
		"no no_new_privs": {
			userRights(true), credentials{noNewPrivs: true}, with(user, func(c *credentials) { c.noNewPrivs = false }), programs{},
			[]string{"lacks no_new_privs"},
		},
		"no seccomp filter":   {userRights(true), credentials{seccomp: 2, filters: 1}, user, programs{}, []string{"lacks the seccomp filter"}},
		"fewer filters":       {userRights(true), credentials{seccomp: 2, filters: 2}, with(user, func(c *credentials) { c.seccomp, c.filters = 2, 1 }), programs{}, []string{"lacks the seccomp filter"}},
		"a filter of its own": {userRights(true), credentials{}, with(user, func(c *credentials) { c.seccomp, c.filters = 2, 3 }), programs{}, nil},
		"what Kata has taken away": {
			rootRights(true), credentials{bounding: all &^ caps(capability.CAP_CHOWN)}, root, programs{},
			[]string{"has the capability CAP_CHOWN, which", "CAP_CHOWN in its bounding set"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := &Container{placeholder: tc.placeholder}
			tc.placeholder.noNewPrivs = tc.rights.GetNoNewPrivs()
			if tc.placeholder.bounding == 0 {
				tc.placeholder.bounding = 1<<41 - 1
			}
			tc.placeholder.uids, tc.placeholder.gids = make([]uint32, 4), make([]uint32, 4)
			c.rights = newRights(tc.rights, &tc.placeholder)
			k := &check{Container: c, programs: &tc.programs}
			if err := k.thread(os.Getpid(), &tc.have); err != nil {
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
		})
	}
}

func TestCredentialsOfAProcess(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("changes its user, which takes root")
	}
	cmd := exec.Command("setpriv", "--reuid", "7", "--regid", "8", "--groups", "9,10", "--no-new-privs", "--inh-caps=-all", "--bounding-set", "-all,+chown", "sh", "-c", "echo; read line")
	testproc.Ready(t, cmd)
	pid := cmd.Process.Pid
	have, err := readCredentials(pid, pid)
	if err != nil {
		t.Fatal(err)
	}
	if have.exited || have.uids[0] != 7 || have.uids[3] != 7 || have.gids[1] != 8 || len(have.groups) != 2 || have.groups[1] != 10 ||
		have.bounding != caps(capability.CAP_CHOWN) || have.effective != 0 || !have.noNewPrivs || have.seccomp != 0 {
		t.Errorf("%+v", have)
	}
}

func TestCredentialsThatCannotBeRead(t *testing.T) {
	const good = "State:\tS (sleeping)\nUid:\t1\t2\t3\t4\nGid:\t1\t2\t3\t4\nGroups:\t\nCapInh:\t0\nCapPrm:\t0\nCapEff:\t0\nCapBnd:\t000001ffffffffff\nCapAmb:\t0\nNoNewPrivs:\t0\n"
	if c, err := parseCredentials(good); err != nil || c.bounding != 1<<41-1 || c.uids[3] != 4 {
		t.Fatalf("%+v, %v", c, err)
	}
	for _, bad := range []string{
		"", strings.Replace(good, "NoNewPrivs", "NoPrivs", 1), strings.Replace(good, "CapBnd:\t0", "CapBnd:\tx", 1),
		strings.Replace(good, "Uid:\t1", "Uid:\t", 1), strings.Replace(good, "Groups:\t", "Groups:\t-1", 1),
	} {
		if c, err := parseCredentials(bad); err == nil {
			t.Errorf("%q: %+v", bad, c)
		}
	}
}

func TestPrograms(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("gives a file capabilities, which takes root")
	}
	shell, err := exec.LookPath("sh")
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(shell)
	if err != nil {
		t.Fatal(err)
	}
	path := t.TempDir() + "/sh"
	if err := os.WriteFile(path, data, 0o755); err != nil {
		t.Fatal(err)
	}
	// Revision 2, effective: CAP_NET_RAW and CAP_BPF permitted, CAP_CHOWN
	// inheritable.
	attr := []byte{1, 0, 0, 2, 0, 0x20, 0, 0, 1, 0, 0, 0, 0x80, 0, 0, 0, 0, 0, 0, 0}
	if err := unix.Setxattr(path, "security.capability", attr, 0); err != nil {
		t.Skipf("the temporary directory keeps no capabilities: %v", err)
	}
	cmd := exec.Command(path, "-c", "echo; read line")
	testproc.Ready(t, cmd)
	own, err := readMounts(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for mode, want := range map[os.FileMode][2]int{0o755: {0, 0}, 0o755 | os.ModeSetuid: {1, 0}, 0o755 | os.ModeSetgid: {0, 1}} {
		if err := os.Chown(path, 7, 8); err != nil {
			t.Fatal(err)
		}
		if err := unix.Setxattr(path, "security.capability", attr, 0); err != nil { // which chown removes
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		p, err := readPrograms([]int{cmd.Process.Pid}, own)
		if err != nil {
			t.Fatal(err)
		}
		if len(p.users) != want[0] || len(p.groups) != want[1] || p.capabilities != caps(capability.CAP_NET_RAW, capability.CAP_BPF, capability.CAP_CHOWN) {
			t.Errorf("%s: %+v", mode, p)
		}
	}
	// One that is not on a file system of the container's came with the images.
	if p, err := readPrograms([]int{cmd.Process.Pid}, &table{}); err != nil || p.capabilities != 0 || len(p.users)+len(p.groups) > 0 {
		t.Errorf("of another file system: %+v, %v", p, err)
	}
}
