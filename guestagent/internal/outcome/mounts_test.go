// SPDX-License-Identifier: Apache-2.0

package outcome

import (
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/kata-checkpoint/kata-checkpoint/internal/testproc"
)

// placeholderMounts are those of a placeholder with masks, a read-only volume, a
// writable one of the same share, and the helper.
const placeholderMounts = `
100 50 0:40 /c/rootfs / rw,relatime - virtiofs kataShared rw
101 100 0:50 / /proc rw,nosuid,nodev,noexec,relatime - proc proc rw
102 100 0:51 / /dev rw,nosuid - tmpfs tmpfs rw,size=65536k
103 102 0:52 / /dev/pts rw,nosuid,noexec - devpts devpts rw
104 102 0:53 / /dev/mqueue rw,nosuid,nodev,noexec - mqueue mqueue rw
105 102 0:31 / /dev/shm rw,relatime - tmpfs shm rw
106 100 0:54 / /sys ro,nosuid,nodev,noexec - sysfs sysfs rw
107 106 0:27 /c /sys/fs/cgroup ro,nosuid,nodev,noexec - cgroup2 cgroup rw
108 100 0:40 /c/config /etc/config ro,relatime - virtiofs kataShared rw
109 100 0:40 /c/data /data rw,relatime - virtiofs kataShared rw
110 101 0:50 /sys /proc/sys ro,nosuid,nodev,noexec - proc proc rw
111 101 0:6 /null /proc/kcore rw,nosuid - devtmpfs devtmpfs rw
112 101 0:55 / /proc/scsi ro,relatime - tmpfs tmpfs ro
113 102 0:32 /kata-checkpoint-agent /dev/.kata-checkpoint ro - tmpfs tmpfs rw
114 102 0:52 /0 /dev/console rw,nosuid,noexec - devpts devpts rw
115 101 0:51 /null /proc/timer_list rw,nosuid - tmpfs tmpfs rw,size=65536k
116 106 0:40 /c/empty /sys/firmware rw,nosuid - virtiofs kataShared rw
`

// restoredMounts are those that CRIU makes of them.
const restoredMounts = `
200 150 0:40 /c/rootfs / rw,relatime - virtiofs kataShared rw
201 200 0:60 / /proc rw,nosuid,nodev,noexec,relatime - proc proc rw
202 200 0:61 / /dev rw,nosuid - tmpfs tmpfs rw,size=65536k
203 202 0:62 / /dev/pts rw,nosuid,noexec - devpts devpts rw
204 202 0:63 / /dev/mqueue rw,nosuid,nodev,noexec - mqueue mqueue rw
205 202 0:31 / /dev/shm rw,relatime - tmpfs shm rw
206 200 0:54 / /sys ro,nosuid,nodev,noexec - sysfs sysfs rw
207 206 0:27 /c /sys/fs/cgroup ro,nosuid,nodev,noexec - cgroup2 cgroup rw
208 200 0:40 /c/config /etc/config ro,relatime - virtiofs kataShared rw
209 200 0:40 /c/data /data rw,relatime - virtiofs kataShared rw
210 201 0:60 /sys /proc/sys ro,nosuid,nodev,noexec - proc proc rw
211 201 0:6 /null /proc/kcore rw,nosuid - devtmpfs devtmpfs rw
212 201 0:65 / /proc/scsi ro,relatime - tmpfs tmpfs ro
214 202 0:62 /3 /dev/console rw,nosuid,noexec - devpts devpts rw
215 201 0:61 /null /proc/timer_list rw,nosuid - tmpfs tmpfs rw,size=65536k
216 206 0:40 /c/empty /sys/firmware rw,nosuid - virtiofs kataShared rw
`

// guestDevices are those of the guest: tmpfs, /dev, its disk.
var guestDevices = map[[2]int]bool{{0, 31}: true, {0, 32}: true, {0, 6}: true, {254, 0}: true, {0, 40}: true}

func mustParse(t *testing.T, text string) *table {
	t.Helper()
	out, err := parseMounts(strings.NewReader(strings.TrimLeft(text, "\n")))
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestCompareMounts(t *testing.T) {
	replaced := func(pairs ...string) string { return strings.NewReplacer(pairs...).Replace(restoredMounts) }
	without := func(point string) string {
		return strings.Join(slices.DeleteFunc(strings.Split(restoredMounts, "\n"), func(line string) bool { return strings.Contains(line, " "+point+" ") }), "\n")
	}
	const tmp = " - tmpfs tmpfs rw\n"
	for name, tc := range map[string]struct {
		have string
		want string
		// able is what is wrong if the container can mount.
		able string
	}{
		"as CRIU makes them": {have: restoredMounts},
		"less restricted by nothing": {have: replaced(
			"/c/data /data rw", "/c/data /data ro", "/c/rootfs / rw", "/c/rootfs / ro,nosuid", "/dev/mqueue rw", "/dev/mqueue ro")},
		"without a volume":                 {have: without("/etc/config")},
		"without a mask":                   {have: without("/proc/kcore"), want: "sees /proc/kcore, which the container does not"},
		"without a mask of a directory":    {have: without("/proc/scsi"), want: "sees /proc/scsi"},
		"without a mask of its own /dev":   {have: without("/proc/timer_list"), want: "sees /proc/timer_list"},
		"without another mount over /sys":  {have: without("/sys/firmware"), want: "sees /sys/firmware"},
		"another mask":                     {have: replaced("0:6 /null /proc/kcore rw,nosuid - devtmpfs devtmpfs rw", "0:71 / /proc/kcore ro - tmpfs tmpfs rw")},
		"a mask more":                      {have: restoredMounts + "220 201 0:6 /null /proc/keys rw - devtmpfs devtmpfs rw\n"},
		"something else for a mask":        {have: replaced("0:6 /null /proc/kcore rw,nosuid - devtmpfs devtmpfs rw", "0:60 /kcore /proc/kcore rw,nosuid,nodev,noexec - proc proc rw"), want: "type proc mounted at /proc/kcore"},
		"a device for a mask":              {have: replaced("/null /proc/kcore", "/vda /proc/kcore"), want: "has the file system devtmpfs (devtmpfs) mounted at /proc/kcore"},
		"a writable tmpfs for a mask":      {have: replaced("/proc/scsi ro,relatime - tmpfs tmpfs ro", "/proc/scsi rw,nosuid,nodev - tmpfs tmpfs rw"), want: "has /proc/scsi without ro"},
		"without a read-only path":         {have: without("/proc/sys"), want: "has /proc/sys without ro, unlike the container"},
		"a writable path":                  {have: replaced("/proc/sys ro,", "/proc/sys rw,"), want: "has /proc/sys without ro"},
		"a writable /sys":                  {have: replaced("/sys ro,", "/sys rw,"), want: "has /sys without ro"},
		"a file system that is read-only":  {have: replaced("/sys ro,nosuid,nodev,noexec - sysfs sysfs rw", "/sys rw,nosuid,nodev,noexec - sysfs sysfs ro")},
		"a writable volume":                {have: replaced("/etc/config ro", "/etc/config rw"), want: "has /etc/config without ro"},
		"set-user-ID programs":             {have: replaced("/dev rw,nosuid", "/dev rw"), want: "has /dev without nosuid"},
		"a part of a volume elsewhere":     {have: restoredMounts + "220 200 0:40 /c/data/part /mnt rw - virtiofs kataShared rw\n"},
		"a part of it, writable":           {have: restoredMounts + "220 200 0:40 /c/config/part /mnt rw - virtiofs kataShared rw\n", want: "has /mnt without ro"},
		"the root of the guest":            {have: restoredMounts + "220 200 254:0 / /mnt rw - ext4 /dev/vda rw\n", want: "has the file system /dev/vda (ext4) mounted at /mnt", able: "has the file system /dev/vda (ext4) mounted at /mnt"},
		"the root of the share":            {have: restoredMounts + "220 200 0:40 / /mnt ro - virtiofs kataShared rw\n", want: "has the file system kataShared (virtiofs)", able: "has the file system kataShared (virtiofs)"},
		"another container of the share":   {have: restoredMounts + "220 200 0:40 /c/rootfs2 /mnt ro - virtiofs kataShared rw\n", want: "has the file system kataShared (virtiofs)", able: "has the file system kataShared (virtiofs)"},
		"the agent's program":              {have: restoredMounts + "220 200 0:32 /kata-checkpoint-agent /mnt ro - tmpfs tmpfs rw\n", want: "has the file system tmpfs (tmpfs) mounted at /mnt", able: "has the file system tmpfs (tmpfs)"},
		"the agent's directory":            {have: restoredMounts + "220 200 0:32 / /mnt ro,nosuid,nodev - tmpfs tmpfs rw\n", want: "has the file system tmpfs (tmpfs) mounted at /mnt", able: "has the file system tmpfs (tmpfs)"},
		"the guest's /dev":                 {have: restoredMounts + "220 200 0:6 / /mnt rw - devtmpfs devtmpfs rw\n", want: "has the file system devtmpfs"},
		"a tmpfs":                          {have: restoredMounts + "220 200 0:70 / /mnt rw,nosuid,nodev" + tmp},
		"a tmpfs with devices":             {have: restoredMounts + "220 200 0:70 / /mnt rw,nosuid" + tmp, want: "has a tmpfs mounted at /mnt without nodev"},
		"a second /proc":                   {have: restoredMounts + "220 200 0:60 / /mnt rw,nosuid,nodev,noexec - proc proc rw\n", want: "type proc mounted at /mnt"},
		"a hidden /proc":                   {have: replaced("201 200 0:60 / /proc", "220 200 0:60 / /proc rw,nosuid,nodev,noexec,relatime - proc proc rw\n201 220 0:60 / /proc"), want: "has a hidden file system of the type proc at /proc"},
		"a /proc below a tmpfs":            {have: replaced("201 200 0:60 / /proc rw", "220 200 0:60 / /proc rw,nosuid,nodev,noexec,relatime - proc proc rw\n221 220 0:70 / /proc rw,nosuid,nodev - tmpfs tmpfs rw\n201 221 0:60 / /proc rw"), want: "has a hidden file system of the type proc at /proc"},
		"another part of /proc":            {have: replaced("0:60 /sys /proc/sys", "0:60 /irq /proc/sys"), want: "has /irq of a file system of the type proc mounted at /proc/sys, and the container /sys"},
		"sysfs in place of /dev/mqueue":    {have: replaced("204 202 0:63 / /dev/mqueue rw,nosuid,nodev,noexec - mqueue", "204 202 0:54 / /dev/mqueue rw,nosuid,nodev,noexec - sysfs"), want: "type sysfs mounted at /dev/mqueue"},
		"all cgroups":                      {have: replaced("0:27 /c /sys/fs/cgroup", "0:27 / /sys/fs/cgroup"), want: "has / of a file system of the type cgroup2 mounted at /sys/fs/cgroup, and the container /c"},
		"a root that is another container": {have: replaced("/c/rootfs /", "/other/rootfs /"), want: "has the file system kataShared (virtiofs) mounted at /,", able: "has the file system kataShared (virtiofs) mounted at /,"},
	} {
		t.Run(name, func(t *testing.T) {
			for can, want := range map[bool]string{false: tc.want, true: tc.able} {
				got := strings.Join((&comparison{mustParse(t, tc.have), mustParse(t, placeholderMounts), guestDevices, can}).problems(), "; ")
				if want == "" && got != "" || !strings.Contains(got, want) {
					t.Errorf("can mount: %t: got %q, want %q", can, got, want)
				}
			}
		})
	}
}

// A /proc with options must have them again.
func TestCompareProcOptions(t *testing.T) {
	placeholder := mustParse(t, strings.Replace(placeholderMounts, "- proc proc rw", "- proc proc rw,hidepid=invisible", 1))
	if got := (&comparison{mustParse(t, restoredMounts), placeholder, guestDevices, false}).problems(); len(got) != 1 || !strings.Contains(got[0], "has /proc without hidepid=invisible") {
		t.Errorf("got %q", got)
	}
	if got := (&comparison{mustParse(t, strings.ReplaceAll(restoredMounts, "- proc proc rw", "- proc proc rw,hidepid=invisible")), placeholder, guestDevices, false}).problems(); len(got) != 0 {
		t.Errorf("got %q", got)
	}
}

func TestMountsThatCannotBeRead(t *testing.T) {
	for name, text := range map[string]string{
		"none":         "",
		"two roots":    "1 0 0:1 / / rw - tmpfs t rw\n2 9 0:1 / /a rw - tmpfs t rw\n",
		"a circle":     "1 2 0:1 / / rw - tmpfs t rw\n2 1 0:1 / /a rw - tmpfs t rw\n",
		"not mounts":   "what is this",
		"no separator": "1 0 0:1 / / rw tmpfs t rw\n",
	} {
		if table, err := parseMounts(strings.NewReader(text)); err == nil {
			t.Errorf("%s: %+v", name, table)
		}
	}
}

// The mounts are those of the namespace, whatever root a process has.
func TestMountsOfAProcessInAnotherRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounts, which takes root")
	}
	dir := t.TempDir()
	cmd := exec.Command("unshare", "--mount", "sh", "-c", `mount -t tmpfs -o ro,nosuid looked-for "$0" && mkdir -p /tmp/. && exec chroot / sh -c 'echo; read line'`, dir)
	testproc.Ready(t, cmd)
	have, err := readMounts(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if m := have.at(dir + "/below"); m.Source != "looked-for" || !slices.Equal(restrictions(m), []string{"ro", "nosuid"}) {
		t.Errorf("at %s: %+v", dir, m)
	}
	own, err := readMounts(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if m := own.at(dir); m.Source == "looked-for" {
		t.Errorf("in this namespace: %+v", m)
	}
}
