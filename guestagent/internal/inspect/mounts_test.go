// SPDX-License-Identifier: Apache-2.0

package inspect

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

func parseMounts(t *testing.T, text string) []*mountinfo.Info {
	t.Helper()
	m, err := mountinfo.GetMountsFromReader(strings.NewReader(text), nil)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestExternalsAreWhatIsNotTheContainersOwn(t *testing.T) {
	guest := parseMounts(t, `20 1 0:5 / /dev rw - devtmpfs devtmpfs rw
21 1 0:20 / /proc rw - proc proc rw
22 1 0:21 / /sys rw - sysfs sysfs rw
23 22 0:22 / /sys/fs/cgroup rw - cgroup2 cgroup rw
24 1 0:30 / /run rw - tmpfs tmpfs rw
25 24 0:31 / /run/kata-containers/sandbox/shm rw - tmpfs shm rw
26 24 0:40 / /run/kata-containers/shared/containers rw - virtiofs kataShared rw
27 24 0:33 / /run/kata-containers/sandbox/ephemeral/cache rw - tmpfs tmpfs rw
`)
	container := parseMounts(t, `100 99 0:41 / / rw - virtiofs none rw
101 100 0:50 / /proc rw - proc proc rw
102 100 0:51 / /dev rw - tmpfs tmpfs rw
103 102 0:52 / /dev/pts rw - devpts devpts rw
104 102 0:53 / /dev/mqueue rw - mqueue mqueue rw
105 100 0:21 / /sys ro - sysfs sysfs rw
106 105 0:22 /default/c1 /sys/fs/cgroup ro - cgroup2 cgroup rw
107 102 0:31 / /dev/shm rw - tmpfs shm rw
108 100 0:40 /c1-0123-hosts /etc/hosts rw - virtiofs kataShared rw
109 100 0:42 / /data rw - virtiofs none rw
110 101 0:51 /null /proc/keys rw - tmpfs tmpfs rw
111 101 0:5 /null /proc/kcore rw - devtmpfs devtmpfs rw
112 101 0:50 /sys /proc/sys ro - proc proc rw
113 100 0:33 / /cache rw - tmpfs tmpfs rw
114 100 0:60 / /scratch rw - tmpfs tmpfs rw
115 100 0:61 / /marked rw - tmpfs tmpfs rw
116 100 8:1 / /disk rw - ext4 /dev/vdb rw
`)
	got := Externals(container, guest, []string{"/marked"})
	var destinations []string
	names := make(map[string]bool)
	for _, e := range got {
		destinations = append(destinations, e.GetDestination())
		names[e.GetName()] = true
		if e.GetDevice() != (e.GetDestination() == "/proc/kcore") {
			t.Errorf("%s: device = %v", e.GetDestination(), e.GetDevice())
		}
	}
	slices.Sort(destinations)
	want := []string{"/cache", "/data", "/dev/shm", "/disk", "/etc/hosts", "/marked", "/proc/kcore", "/sys/fs/cgroup"}
	if !slices.Equal(destinations, want) {
		t.Errorf("externals = %v, want %v", destinations, want)
	}
	if p := partial(container, got); !slices.Equal(p, []string{"/sys/fs/cgroup", "/etc/hosts"}) {
		t.Errorf("partial = %v", p)
	}
	if len(names) != len(got) {
		t.Errorf("names are not distinct: %v", names)
	}
}

func TestExternalsKnowTheUpperOfTwoMounts(t *testing.T) {
	container := parseMounts(t, `100 99 0:41 / / rw - virtiofs none rw
108 100 0:42 / /data rw - virtiofs none rw
109 108 0:43 / /data rw - virtiofs none rw
`)
	if got := Externals(container, nil, nil); len(got) != 1 || got[0].GetDestination() != "/data" {
		t.Errorf("externals = %v", got)
	}
}

// A FUSE file system that is no virtiofs may be served by the container itself.
func TestOnlyVirtiofsIsTheHosts(t *testing.T) {
	for root, want := range map[string][2]bool{"virtiofs": {true, true}, "ext4": {false, true}, "fuse": {false, false}, "fuse.nydus": {false, false}, "nfs4": {false, false}} {
		c := &Container{mounts: &mountTable{root: parseMounts(t, "100 99 0:41 / / rw - "+root+" none rw\n101 100 0:42 / /x rw - virtiofs x rw\n")}}
		if shared, answers := c.RootIsShared(); shared != want[0] || answers != want[1] {
			t.Errorf("%s: %v %v", root, shared, answers)
		}
	}
}

// made has the mounts of a container that was created with the first six.
const made = `100 99 0:41 / / rw - virtiofs none rw
101 100 0:50 / /proc rw - proc proc rw
102 100 0:60 / /run rw - tmpfs tmpfs rw
103 100 0:31 / /dev/shm rw - tmpfs shm rw
104 100 0:42 / /data rw - virtiofs none rw
105 100 0:41 /etc/hosts /etc/hosts rw - virtiofs none rw
106 100 0:41 /a /b rw - virtiofs none rw
107 100 0:70 / /t rw - tmpfs t rw
108 107 0:71 / /m rw - overlay o rw
109 100 0:72 / /mnt rw - fuse.sshfs x rw
110 100 0:73 / /sys/kernel/config rw - configfs none rw
111 104 0:74 / /data rw - tmpfs over rw
112 102 0:75 / /run/user rw - tmpfs tmpfs rw
`

var madePoints = []string{"/", "/proc", "/run", "/dev/shm", "/data", "/etc/hosts"}

func TestMountsOfAContainersOwnProgramsAreNotExternal(t *testing.T) {
	mounts := parseMounts(t, made)
	var have []string
	for _, e := range Externals(Given(mounts, madePoints), nil, nil) {
		have = append(have, e.GetDestination())
	}
	if want := []string{"/dev/shm", "/data", "/etc/hosts"}; !slices.Equal(have, want) {
		t.Errorf("external are %q, not %q", have, want)
	}
	if have := Given(mounts, nil); len(have) != len(mounts) {
		t.Errorf("without a list %d of %d are given", len(have), len(mounts))
	}
}

func TestMountsThatCannotBeRestoredAreFound(t *testing.T) {
	var have []string
	for _, f := range madeMounts(parseMounts(t, made), Given(parseMounts(t, made), madePoints)) {
		if f.Class != Refused || f.Advice == "" {
			t.Errorf("%v is no refusal with advice", f)
		}
		have = append(have, f.What)
	}
	if len(have) != 2 || !strings.Contains(have[0], "type overlay at /m,") || !strings.Contains(have[1], "type fuse.sshfs at /mnt,") {
		t.Errorf("findings %q", have)
	}
}

func TestMountedTerminalsAreFound(t *testing.T) {
	mounts := parseMounts(t, `100 99 0:41 / / rw - virtiofs none rw
102 100 0:52 / /dev/pts rw - devpts devpts rw
103 100 0:52 /0 /dev/console rw - devpts devpts rw
104 100 0:52 /1 /dev/console rw - devpts devpts rw
105 100 0:52 /ptmx /dev/ptmx rw - devpts devpts rw
106 100 0:52 /0 /newroot/dev/console rw - devpts devpts rw
107 100 0:53 / /newroot/dev/pts rw - devpts devpts rw
108 100 0:53 /0 /newroot/dev/tty1 rw - devpts devpts rw
`)
	var have []string
	for _, f := range madeMounts(mounts, Given(mounts, []string{"/", "/dev/pts", "/dev/console"})) {
		if f.Class != Refused || f.Advice == "" {
			t.Errorf("%v is no refusal with advice", f)
		}
		have = append(have, f.What)
	}
	if len(have) != 2 || !strings.Contains(have[0], "/dev/pts/1 at /dev/console,") || !strings.Contains(have[1], "/dev/pts/0 at /newroot/dev/tty1,") {
		t.Errorf("findings %q", have)
	}
}

func TestInImages(t *testing.T) {
	mounts := parseMounts(t, made)
	external := Externals(Given(mounts, madePoints), nil, nil)
	for path, want := range map[string]bool{
		"/file": false, "/run/file": true, "/run/user/1/file": true, "/runner": false, "/dev/shm/sem": false, "/b/file": false, "/t/file": true, "/m/file": false,
	} {
		if have := InImages(path, mounts, external); have != want {
			t.Errorf("%s: %v", path, have)
		}
	}
}

func TestFileMounts(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounts a file system")
	}
	dir := t.TempDir()
	for _, name := range []string{"file", "other"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	point := filepath.Join(dir, "other")
	if err := unix.Mount(filepath.Join(dir, "file"), point, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(point, unix.MNT_DETACH) //nolint:errcheck // the end of the test
	have, err := look(t, os.Getpid()).FileMounts(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(have, point) || slices.Contains(have, "/") || slices.Contains(have, "/proc") {
		t.Errorf("the mounts of files are %q", have)
	}
}
