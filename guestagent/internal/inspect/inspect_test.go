// SPDX-License-Identifier: Apache-2.0

package inspect

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/testproc"
)

func TestProcessesAreReadAsTheyAre(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	written, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer written.Close()
	read, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	cmd := exec.Command("/bin/sh", "-c", "echo ready; read line")
	cmd.ExtraFiles = []*os.File{written, read}
	testproc.Ready(t, cmd)

	p := processes(t, cmd.Process.Pid)[0]
	if p.Name != "sh" || p.Parent != os.Getpid() || p.PIDs[0] != p.PID || p.Namespaces["net"] == "" {
		t.Errorf("%+v", p)
	}
	for fd, writable := range map[int]bool{3: true, 4: false} {
		i := slices.IndexFunc(p.Files, func(f File) bool { return f.FD == fd })
		if i < 0 || p.Files[i].Name != path || p.Files[i].MountID == 0 || p.Files[i].writable() != writable {
			t.Errorf("descriptor %d among %+v", fd, p.Files)
		}
	}
	if i := slices.IndexFunc(p.Files, func(f File) bool { return f.FD == 3 }); p.Files[i].Flags&unix.O_APPEND == 0 {
		t.Errorf("flags %o", p.Files[i].Flags)
	}
	shell, err := os.Readlink("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	self := processes(t, os.Getpid())[0]
	if !slices.ContainsFunc(self.Mappings, func(m Mapping) bool { return m.Path == shell && !m.Shared }) {
		t.Errorf("%s is not among the mappings", shell)
	}
}

func TestNamesAreFitForATerminal(t *testing.T) {
	cmd := exec.Command("/bin/sh", "-c", `printf 'a\033[2Jb' >/proc/$$/comm; echo ready; read line`)
	testproc.Ready(t, cmd)
	if name := processes(t, cmd.Process.Pid)[0].Name; name != "a?[2Jb" {
		t.Errorf("name %q", name)
	}
}

// A process that has exited is left out, be it reaped or not, and one that is
// the root is an error.
func TestProcessesThatHaveExited(t *testing.T) {
	cmd := exec.Command("true")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := cmd.Process.Pid
	var info unix.Siginfo
	if err := unix.Waitid(unix.P_PID, pid, &info, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
	for _, p := range processes(t, pid) { // a zombie
		if len(p.Files) > 0 || len(p.Mappings) > 0 {
			t.Errorf("a zombie has %+v", p)
		}
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if p := processes(t, pid, os.Getpid()); len(p) != 1 || p[0].PID != os.Getpid() {
		t.Errorf("got %+v", p)
	}
	if _, err := Look(t.Context(), pid, []int{pid, os.Getpid()}, nil); err == nil {
		t.Error("a container without its root")
	}
}

func TestParseMapping(t *testing.T) {
	r := reader{mapped: make(map[string]Mapping)}
	for line, want := range map[string]Mapping{
		"00400000-0040b000 r--p 00000000 fe:01 1234    /usr/bin/a file":           {"400000-40b000", false, "fe:01", "/usr/bin/a file", 1234},
		"7f0000000000-7f0000001000 rw-s 00000000 00:1c 7 /dev/shm/x":              {"7f0000000000-7f0000001000", true, "00:1c", "/dev/shm/x", 7},
		"7f0000000000-7f0000001000 rw-s 00000000 00:0f 600 anon_inode:[io_uring]": {"7f0000000000-7f0000001000", true, "00:0f", "anon_inode:[io_uring]", 600},
		"7ffd1c000000-7ffd1c021000 rw-p 00000000 00:00 0         [stack]":         {},
		"7f0000000000-7f0000001000 rw-p 00000000 00:00 0         [anon:a/b]":      {},
		"7f0000000000-7f0000001000 rw-p 00000000 00:00 0 ":                        {},
		"7f0000000000-7f0000001000 r--p 00000000 fe:01 x /usr/bin/a":              {},
		"00000000-00001000 r--p 00000000 fe:01 1234 /zero":                        {"0-1000", false, "fe:01", "/zero", 1234},
		"": {},
	} {
		for range 2 { // the second time it is known
			var got Mapping
			addresses, shared, file, ok := cutMapping([]byte(line))
			if ok {
				if got, ok = r.file(file); ok {
					got.Addresses, got.Shared = MapFilesName(string(addresses)), shared
				}
			}
			if got != want || ok != (want != Mapping{}) {
				t.Errorf("%q is %+v, %t", line, got, ok)
			}
		}
	}
}

// BenchmarkLook is all that is looked at before a checkpoint, in a container of
// 100 processes with a shell's libraries and a few descriptors each. On a host's
// kernel it is to take at most 20 ms; the processor time does not depend on what
// else the machine does.
func BenchmarkLook(b *testing.B) {
	const processes = 100
	cmd := exec.Command("sh", "-c", fmt.Sprintf(`exec 4</dev/null 5</proc/self/stat 6<"$0"; i=1; while [ $i -lt %d ]; do sleep 1000 & all="$all $!"; i=$((i+1)); done; echo ready; read line; kill $all`, processes), os.Args[0])
	testproc.Ready(b, cmd)
	root := cmd.Process.Pid
	pids := append([]int{root}, children(b, root)...)
	mounts, err := Mounts(root)
	if err != nil {
		b.Fatal(err)
	}
	var points []Point
	for _, m := range mounts {
		points = append(points, NewPoint(m))
	}
	must := func(_ any, err error) {
		if err != nil {
			b.Fatal(err)
		}
	}
	used := func() time.Duration {
		var u unix.Rusage
		if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
			b.Fatal(err)
		}
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	before := used()
	for b.Loop() {
		c, err := Look(b.Context(), root, pids, points)
		must(nil, err)
		if len(c.Processes) != processes {
			b.Fatalf("%d processes", len(c.Processes))
		}
		must(c.Check(nil, &api.CheckpointOptions{}))
		_, err = c.CheckMounts(nil)
		must(nil, err)
		c.CheckTerminals(nil)
		must(c.CheckNames(b.Context(), nil))
		_, _, err = c.CheckIPC(nil)
		must(nil, err)
	}
	b.ReportMetric(float64((used()-before).Microseconds())/1000/float64(b.N), "cpu-ms/op")
}
