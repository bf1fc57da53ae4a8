// SPDX-License-Identifier: Apache-2.0

package inspect

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/testproc"
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

var madePoints = paths("/", "/proc", "/run", "/dev/shm", "/data", "/etc/hosts")

// paths are mounts as earlier agents have noted them.
func paths(list ...string) (points []Point) {
	for _, path := range list {
		points = append(points, Point{Path: path})
	}
	return points
}

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
	for _, f := range madeMounts(mounts, Given(mounts, paths("/", "/dev/pts", "/dev/console"))) {
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

// changed are the mounts of a container when it is created, by lines that tests
// replace or follow with others.
const changed = `100 99 0:41 /c/rootfs / rw - virtiofs none rw
101 100 0:50 / /proc rw - proc proc rw
102 100 0:60 / /run rw - tmpfs tmpfs rw
103 100 0:31 / /dev/shm rw master:1 - tmpfs shm rw
104 100 0:42 /c-data /data rw - virtiofs none rw
105 100 0:41 /c-hosts /etc/hosts rw - virtiofs none rw
`

// A mount in place of one that the container was created with is not that one.
func TestOnlyTheMountsOfCreationAreGiven(t *testing.T) {
	var points []Point
	for _, m := range parseMounts(t, changed) {
		points = append(points, NewPoint(m))
	}
	for name, test := range map[string]struct {
		from, to string
		given    bool
		path     string
	}{
		"as it was":                 {"", "", true, "/data"},
		"another mount ID":          {"104 100", "204 100", true, "/data"},
		"remounted":                 {"/data rw", "/data ro", true, "/data"},
		"a bind of the root":        {"0:42 /c-data /data", "0:41 /c/rootfs/b /data", false, "/data"},
		"another directory of it":   {"/c-data /data", "/c-data/sub /data", false, "/data"},
		"a tmpfs":                   {"0:42 /c-data /data rw - virtiofs", "0:90 / /data rw - tmpfs", false, "/data"},
		"a new tmpfs for a tmpfs":   {"0:60 / /run", "0:90 / /run", true, "/run"}, // as after a restore
		"a bind of a part of it":    {"0:60 / /run", "0:60 /a /run", false, "/run"},
		"a volume for a tmpfs":      {"0:60 / /run rw - tmpfs", "0:42 /c-data /run rw - virtiofs", false, "/run"},
		"a proc for a proc":         {"0:50 / /proc", "0:90 / /proc", true, "/proc"},
		"a file in place of a file": {"/c-hosts", "/c/rootfs/other", false, "/etc/hosts"},
	} {
		t.Run(name, func(t *testing.T) {
			mounts := parseMounts(t, strings.Replace(changed, test.from, test.to, 1))
			have := slices.ContainsFunc(Given(mounts, points), func(m *mountinfo.Info) bool { return m.Mountpoint == test.path })
			if have != test.given {
				t.Errorf("given: %v", have)
			}
		})
	}
}

// Points of an earlier agent's record are paths alone.
func TestPointsOfARecord(t *testing.T) {
	var points []Point
	if err := json.Unmarshal([]byte(`["/data", {"path": "/run", "root": "/", "type": "tmpfs", "device": 60}]`), &points); err != nil {
		t.Fatal(err)
	}
	if want := []Point{{Path: "/data"}, {"/run", "/", "tmpfs", 60}}; !slices.Equal(points, want) {
		t.Errorf("points %v", points)
	}
	data, err := json.Marshal(points)
	var again []Point
	if err != nil || json.Unmarshal(data, &again) != nil || !slices.Equal(points, again) {
		t.Errorf("%s is read as %v (%v)", data, again, err)
	}
}

func TestVolumesThatWereMovedAreFound(t *testing.T) {
	var points []Point
	for _, m := range parseMounts(t, changed) {
		points = append(points, NewPoint(m))
	}
	for name, test := range map[string]struct{ from, to, want string }{
		"moved":                       {"/c-data /data", "/c-data /data2", "volume to /data2"},
		"a bind, and it is unmounted": {"/c-data /data", "/c-data/sub /b", "volume to /b"},
		"a file, moved":               {"/c-hosts /etc/hosts", "/c-hosts /h", "volume to /h"}, // of the root's device
		"unmounted":                   {"104 100 0:42 /c-data /data rw - virtiofs none rw\n", "", ""},
		"a bind of it":                {"105 100", "106 100 0:42 /c-data/sub /b rw - virtiofs none rw\n105 100", ""},
		"a bind of the root":          {"105 100", "106 100 0:41 /c/rootfs/b /b rw - virtiofs none rw\n105 100", ""},
		"a tmpfs, moved":              {"/ /run", "/ /run2", ""},
	} {
		t.Run(name, func(t *testing.T) {
			mounts := parseMounts(t, strings.Replace(changed, test.from, test.to, 1))
			var have []string
			for _, f := range madeMounts(mounts, Given(mounts, points)) {
				have = append(have, f.String())
			}
			if text := strings.Join(have, "; "); test.want == "" && text != "" || !strings.Contains(text, test.want) {
				t.Errorf("findings %q, not %q", text, test.want)
			}
		})
	}
}

func TestCoveredMountsAreFound(t *testing.T) {
	var points []Point
	for _, m := range parseMounts(t, changed) {
		points = append(points, NewPoint(m))
	}
	for line, want := range map[string]string{
		"":                                     "",
		"106 104 0:90 / /data rw - tmpfs t rw": "/data",
		"106 104 0:42 /c-data /data rw - virtiofs n rw":          "/data",
		"106 105 0:41 /c/rootfs/x /etc/hosts rw - virtiofs n rw": "/etc/hosts",
		"106 102 0:90 / /run rw - tmpfs t rw":                    "", // both are in the image set
		"106 100 0:90 / /etc rw - tmpfs t rw":                    "",
		"106 103 0:90 / /dev/shm rw - tmpfs t rw":                "", // has a rule of its own
	} {
		mounts := parseMounts(t, changed+line)
		findings := covered(mounts, points, Externals(Given(mounts, points), nil, nil))
		if want == "" && len(findings) > 0 || want != "" && (len(findings) != 1 || findings[0].Class != Refused || !strings.Contains(findings[0].What, "over its mount "+want+",")) {
			t.Errorf("%s: findings %v", line, findings)
		}
	}
}

// CRIU takes the propagation of a bind from the root or an external mount, if that
// has the same.
func TestSlavesOfMountsOutsideAreFound(t *testing.T) {
	const root = "100 99 0:41 /c/rootfs / rw master:14 - virtiofs none rw\n"
	var points []Point
	for _, m := range parseMounts(t, changed) {
		points = append(points, NewPoint(m))
	}
	for name, test := range map[string]struct {
		root, others string
		want         string
	}{
		"the root alone":              {root, "", ""},
		"a bind of the root":          {root, "106 100 0:41 /c/rootfs/a /b rw master:14 - virtiofs none rw\n", ""},
		"the root is private":         {"100 99 0:41 /c/rootfs / rw - virtiofs none rw\n", "106 100 0:41 /c/rootfs/a /b rw master:14 - virtiofs none rw\n", "/b"},
		"the root has another master": {root, "106 100 0:41 /c/rootfs/a /b rw master:15 - virtiofs none rw\n", "/b"},
		"a bind of an external mount": {root, "106 100 0:31 /x /b rw master:1 - tmpfs shm rw\n", ""},
		"more than that shows":        {root, "106 100 0:41 /c /b rw master:14 - virtiofs none rw\n", "/b"},
		"a slave of its own":          {root, "106 100 0:90 / /a rw shared:9 - tmpfs t rw\n107 100 0:90 / /b rw master:9 - tmpfs t rw\n", ""},
		"shared, and a slave":         {root, "106 100 0:41 /c/rootfs/a /b rw shared:9 master:14 - virtiofs none rw\n", ""},
		"a tmpfs with no master here": {root, "106 100 0:90 / /b rw master:77 - tmpfs t rw\n", "/b"},
	} {
		mounts := parseMounts(t, test.root+strings.SplitN(changed, "\n", 2)[1]+test.others)
		// In a namespace of a process's own the same holds.
		for i, nested := range []int{len(mounts), len(mounts) - strings.Count(test.others, "\n")} {
			findings := slaves(mounts[:nested], mounts[nested:], Externals(Given(mounts, points), nil, nil))
			if test.want == "" && len(findings) > 0 || test.want != "" && (len(findings) != 1 || findings[0].Class != Refused || !strings.Contains(findings[0].What, "a mount at "+test.want+" that is a slave")) {
				t.Errorf("%s, %d: findings %v", name, i, findings)
			}
		}
	}
}

func TestAProcFileSystemIsFound(t *testing.T) {
	for name, test := range map[string]struct {
		from, to string
		want     bool
	}{
		"as it was":            {"", "", true},
		"unmounted":            {"101 100 0:50 / /proc rw - proc proc rw\n", "", false},
		"moved":                {"/ /proc", "/ /p", false},
		"a part of it":         {"/ /proc", "/sys /proc", false},
		"covered":              {"102 100", "106 101 0:90 / /proc rw - tmpfs t rw\n102 100", false},
		"covered by another":   {"102 100", "106 101 0:91 / /proc rw - proc t rw\n102 100", true},
		"with all of the root": {"102 100", "106 100 0:90 / / rw - tmpfs t rw\n102 100", false},
		"above all":            {"102 100", "106 100 0:90 / / rw - tmpfs t rw\n107 106 0:91 / /proc rw - proc t rw\n102 100", true},
	} {
		if have := hasProc(parseMounts(t, strings.Replace(changed, test.from, test.to, 1))); have != test.want {
			t.Errorf("%s: %v", name, have)
		}
	}
}

// A namespace whose mounts propagate is refused without a /proc, init's and one
// below it.
func TestNamespacesWithoutProcAreFound(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("makes mount namespaces")
	}
	for script, want := range map[string]string{
		"true": "",
		"mount --make-rprivate /; umount -l /proc":                                            "",
		"mount --make-rslave /; mount -t tmpfs t $D; mount --make-shared $D; umount -l /proc": "the container has unmounted, moved or covered its /proc",
	} {
		cmd := exec.Command("unshare", "--mount", "sh", "-e", "-c", script+"; echo ready; read line")
		cmd.Env = append(os.Environ(), "D="+t.TempDir())
		testproc.Ready(t, cmd)
		c := look(t, cmd.Process.Pid)
		findings := c.lostProc(spaces(t, c))
		if want == "" && len(findings) > 0 || want != "" && (len(findings) != 1 || !strings.Contains(findings[0].String(), want)) {
			t.Errorf("%s: findings %v", script, findings)
		}
		if want == "" {
			continue
		}
		// Seen from a container that has one.
		self := look(t, os.Getpid())
		self.Processes = append(self.Processes, c.Processes...)
		if findings := self.lostProc(spaces(t, self)); len(findings) != 1 || !strings.Contains(findings[0].String(), "is in a mount namespace without a proc file system") {
			t.Errorf("below another: %v", findings)
		}
	}
}

func spaces(t *testing.T, c *Container) []mountNamespace {
	t.Helper()
	out, err := c.mountNamespaces()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestFilesOnACoveredMountAreFound(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("makes mount namespaces")
	}
	for script, want := range map[string]string{
		"exec 3>t/file":                                                     "",
		"exec 3>t/file; mount -t tmpfs u t":                                 "t/file open on a mount that another one covers",
		"exec 3>t/file; mount -t tmpfs u t; umount t":                       "",
		"exec 3>t/file; mount --bind t t":                                   "t/file open on a mount that another one covers",
		"mount -t tmpfs u t; exec 3>t/file":                                 "",
		"exec 3>s/file; mount --bind . .":                                   "s/file open on a mount that another one covers",
		"mkdir t/u; mount -t tmpfs u t/u; exec 3>t/u/f; mount -t tmpfs v t": "t/u/f open on a mount that another one covers",
		"cd t; mount -t tmpfs u .":                                          "has its working directory on a mount that another one covers",
		"cp /bin/sleep t; t/sleep 1000 & while [ $(readlink /proc/$!/exe) != $D/t/sleep ]; do :; done; mount -t tmpfs u t": "t/sleep mapped on a mount that another one covers",
	} {
		cmd := exec.Command("unshare", "--mount", "sh", "-e", "-c", "cd $D; mkdir s t; mount -t tmpfs s s; mount -t tmpfs t t; cd .; "+script+"; echo ready; read line || kill $!")
		cmd.Env = append(os.Environ(), "D="+t.TempDir())
		testproc.Ready(t, cmd)
		c := look(t, append([]int{cmd.Process.Pid}, children(t, cmd.Process.Pid)...)...)
		var texts []string
		for _, f := range c.underCovered(spaces(t, c)) {
			texts = append(texts, f.String())
		}
		if text := strings.Join(texts, "; "); want == "" && text != "" || !strings.Contains(text, want) {
			t.Errorf("%s: findings %q, want %q", script, texts, want)
		}
	}
}

func TestFilesOnADetachedMountAreFound(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("makes mount namespaces")
	}
	for script, want := range map[string]string{
		"exec 3>t/file":                                "",
		"exec 3>t/file; umount -l t":                   "file /file open, whose mount was unmounted",
		"exec 3<t; umount -l t":                        "file / open, whose mount was unmounted",
		"exec 3</dev/null 4</dev/urandom; umount -l t": "",
		"exec 3>t/file; unshare --mount umount -l t":   "",
	} {
		cmd := exec.Command("unshare", "--mount", "sh", "-e", "-c", "cd $D; mkdir t; mount -t tmpfs t t; "+script+"; echo ready; read line")
		cmd.Env = append(os.Environ(), "D="+t.TempDir())
		testproc.Ready(t, cmd)
		c := look(t, cmd.Process.Pid)
		findings, err := c.detached(spaces(t, c))
		if err != nil {
			t.Fatal(err)
		}
		if want == "" && len(findings) > 0 || want != "" && (len(findings) != 1 || !strings.Contains(findings[0].String(), want)) {
			t.Errorf("%s: findings %v", script, findings)
		}
	}
	// Memory has no mount, and a queue has a rule of its own.
	fd, err := unix.MemfdCreate("memory", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	queue, err := makeQueue("detached")
	must(t, err, removeQueue("detached"))
	defer unix.Close(queue)
	self := look(t, os.Getpid())
	if findings, err := self.detached(spaces(t, self)); err != nil || len(findings) > 0 {
		t.Errorf("of memory and a queue: %v, %v", findings, err)
	}
}
