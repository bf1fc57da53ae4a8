// SPDX-License-Identifier: Apache-2.0

package outcome

import (
	"os"
	"slices"
	"strings"
	"testing"
)

// What is accepted has all that is compared.
func FuzzParseCredentials(f *testing.F) {
	own, err := os.ReadFile("/proc/self/status")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(string(own))
	f.Add("Name:\tUid: 0 0 0 0\nState:\tZ\nUid:\t1 2 3 4\nGid:\t1 2 3 4\nGroups:\t \nCapInh:\t0\nCapPrm:\tffffffffffffffff\nCapEff:\t0\nCapBnd:\t0\nCapAmb:\t0\nNoNewPrivs:\t1\n")
	f.Fuzz(func(t *testing.T, status string) {
		c, err := parseCredentials(status)
		if err != nil {
			return
		}
		if len(c.uids) != 4 || len(c.gids) != 4 {
			t.Errorf("%q: %+v", status, c)
		}
		for _, set := range []set{c.effective, c.permitted, c.bounding} {
			if (set == 0) != (set.String() == "") {
				t.Errorf("%x is %q", uint64(set), set)
			}
		}
	})
}

// A container's mounts are what it may have. With one more, of a file system that
// it lacks, or with a restriction less, they are not. Nothing does not end.
func FuzzCompareMounts(f *testing.F) {
	f.Add(placeholderMounts)
	f.Add(restoredMounts)
	f.Add("1 0 0:1 / / ro - virtiofs a rw\n2 1 0:1 /x /x rw,nosuid - virtiofs a rw\n")
	f.Add("1 0 0:1 / / rw - virtiofs a rw\n2 3 0:2 / /x rw - tmpfs b rw\n3 2 0:2 / /x rw - tmpfs b rw\n")
	f.Fuzz(func(t *testing.T, text string) {
		may, err := parseMounts(strings.NewReader(text))
		if err != nil {
			return
		}
		for _, canMount := range []bool{false, true} {
			c := comparison{have: may, may: may, guest: may.devices(), canMount: canMount}
			for _, problem := range c.problems() {
				if !strings.Contains(problem, "/dev/.kata-checkpoint") {
					t.Errorf("compared with itself, able to mount %t: %s", canMount, problem)
				}
			}
		}
		more := *may.root
		more.ID, more.Parent, more.Major, more.Minor, more.FSType, more.Mountpoint, more.Root = 1<<30, may.root.ID, 4095, 1<<20-1, "ext4", "/more", "/"
		have := &table{root: may.root, children: may.children, mounts: append(slices.Clip(may.mounts), &more)}
		if may.devices()[[2]int{more.Major, more.Minor}] {
			return
		}
		c := comparison{have: have, may: may, guest: may.devices()}
		if len(c.problems()) == 0 {
			t.Errorf("%q: a mount of another file system is accepted", text)
		}
	})
}
