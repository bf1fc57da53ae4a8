// SPDX-License-Identifier: Apache-2.0

package inspect

import (
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

func TestSharesAreWhatTheHostHas(t *testing.T) {
	got := Shares([]*mountinfo.Info{{FSType: "virtiofs", Minor: 40}, {FSType: "tmpfs", Minor: 41}, {FSType: "fuse.nydus", Minor: 42}, {FSType: "ext4", Major: 254, Minor: 1}})
	if len(got) != 2 || !got[unix.Mkdev(0, 40)] || !got[unix.Mkdev(0, 42)] {
		t.Errorf("shares = %v", got)
	}
}
