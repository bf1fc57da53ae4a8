// SPDX-License-Identifier: Apache-2.0

package inspect

import (
	"bytes"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"

	"github.com/kata-checkpoint/kata-checkpoint/internal/imageset"
)

// The path of a mapped file is the end of its line, whatever is in it, also where
// the line was seen before.
func FuzzParseMapping(f *testing.F) {
	f.Add("00400000-0040b000 r-xp 00000000 fe:00 42 ", "/bin/a (deleted) /x")
	f.Add("7f0000000000-7f0000001000 rw-s 00000000 00:01 7 ", "/dev/zero\\012")
	f.Add("0-0 a b c 1 ", "/")
	f.Fuzz(func(t *testing.T, head, path string) {
		r := reader{mapped: make(map[string]Mapping)}
		_, _, file, ok := cutMapping([]byte(head + path))
		if ok {
			if m, ok := r.file(file); ok && (!strings.HasSuffix(head+path, m.Path) || m.Path == "") {
				t.Errorf("%q: %+v", head+path, m)
			}
		}
		// Of a line of the kernel's.
		line := fmt.Sprintf("7f0000000000-7f0000001000 rw-s 00001000 fe:00 42                         /%s", path)
		for range 2 {
			addresses, shared, file, ok := cutMapping([]byte(line))
			if !ok || !shared || MapFilesName(string(addresses)) != "7f0000000000-7f0000001000" {
				t.Fatalf("%q: %q, %t, %t", line, addresses, shared, ok)
			}
			if m, ok := r.file(file); !ok || m != (Mapping{Device: "fe:00", Inode: 42, Path: "/" + path}) {
				t.Errorf("%q: %+v, %t", line, m, ok)
			}
		}
	})
}

// A descriptor's information is read, or refused.
func FuzzFileInfo(f *testing.F) {
	own, err := os.ReadFile("/proc/self/fdinfo/0")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(string(own))
	f.Add("pos:\t0\nflags:\t0100002\nmnt_id:\t26\nino:\t18446744073709551615\n")
	f.Add("flags:\t9\n")
	f.Fuzz(func(t *testing.T, info string) {
		a, b := File{FD: 1}, File{FD: 1}
		err := a.parseInfo([]byte(info))
		if err == nil && (b.parseInfo([]byte(info+"\nlock:\t1: POSIX  ADVISORY  WRITE 1 00:1:1 0 EOF\n")) != nil || a != b) {
			t.Errorf("%q: %+v and, with a line more, %+v", info, a, b)
		}
	})
}

// A line has as many fields as the title, or is refused.
func FuzzParseSysV(f *testing.F) {
	f.Add("key shmid perms size cpid lpid", "-559038737 32769 1600 4096 12 0")
	f.Add("key msqid lspid", "0 0")
	f.Fuzz(func(t *testing.T, titles, line string) {
		names, fields := strings.Fields(titles), strings.Fields(line)
		o, err := parseSysV(names, fields, "a", []string{"cpid", "lpid"})
		if err == nil && (len(names) != len(fields) || len(o.pids) > 2 || slices.Contains(o.pids, 0)) {
			t.Errorf("%q of %q: %+v", line, titles, o)
		}
	})
}

// Of any mounts, those that are external have names in order, which CRIU does not
// parse, and destinations of their own.
func FuzzMounts(f *testing.F) {
	own, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(own, "/data")
	f.Add([]byte("1 0 0:1 / / rw - virtiofs a rw\n2 1 0:2 / /dev/shm rw - tmpfs b rw\n3 2 0:3 /0 /dev/shm rw - devpts c rw\n4 1 0:4 / /data\\040x rw - virtiofs d rw\n"), "/data x")
	f.Add([]byte("1 1 0:1 / / rw - fuse a rw\n"), "")
	f.Fuzz(func(t *testing.T, data []byte, marked string) {
		mounts, err := mountinfo.GetMountsFromReader(bytes.NewReader(data), nil)
		if err != nil {
			return
		}
		guest := mounts[:len(mounts)/2]
		external := Externals(mounts, guest, []string{marked})
		seen := make(map[string]bool)
		for i, e := range external {
			if e.GetName() != imageset.ExternalName(i) || e.GetDestination() == "/" || seen[e.GetDestination()] {
				t.Errorf("external %d of %q is %v", i, data, e)
			}
			seen[e.GetDestination()] = true
		}
		for _, path := range partial(mounts, external) {
			if !seen[path] {
				t.Errorf("%s is no external mount", path)
			}
		}
		for _, m := range mounts {
			if seen[m.Mountpoint] && InImages(m.Mountpoint, mounts, external) {
				t.Errorf("%s is external, and in the images", m.Mountpoint)
			}
		}
		given := Given(mounts, paths("/", marked))
		for _, finding := range madeMounts(mounts, given) {
			if finding.Class != Refused || finding.Advice == "" {
				t.Errorf("%+v", finding)
			}
		}
	})
}

// The inode of a socket is read as it was printed.
func FuzzSocketInode(f *testing.F) {
	f.Add("socket:[4711]", uint32(7))
	f.Add("socket:[99999999999]", uint32(0))
	f.Fuzz(func(t *testing.T, name string, inode uint32) {
		if n, ok := socketInode(name); ok && n == 0 {
			t.Errorf("%q has the inode 0", name)
		}
		if n, ok := socketInode(fmt.Sprintf("socket:[%d]", inode)); n != inode || ok != (inode != 0) {
			t.Errorf("%d: %d, %t", inode, n, ok)
		}
	})
}
