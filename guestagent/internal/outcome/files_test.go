// SPDX-License-Identifier: Apache-2.0

package outcome

import (
	"math"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"github.com/moby/sys/capability"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/testproc"
)

// holder is a process in a mount namespace of its own that inherits descriptors,
// from 3 on, and the check of it.
func holder(t *testing.T, script string, may set, files ...*os.File) (*check, int) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("makes namespaces, which takes root")
	}
	// What this process has inherited itself is not meant.
	if err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("unshare", "--mount", "sh", "-c", script+"\necho; read line")
	cmd.Dir, cmd.Stderr = "/", t.Output() // by a pipe
	cmd.ExtraFiles = files
	testproc.Ready(t, cmd)
	pid := cmd.Process.Pid
	c := &Container{pid: pid, rights: rights{bounding: may}}
	var err error
	if c.memory, err = unnamedMemory(); err != nil {
		t.Fatal(err)
	}
	if c.namespaces, err = namespaces(pid); err != nil {
		t.Fatal(err)
	}
	k := &check{Container: c, processes: []int{pid}, mountIDs: make(map[uint64]bool), spaces: make(map[string]bool)}
	for kind, link := range c.namespaces {
		k.spaces[link] = kind != "pid" // which is this process's own
	}
	mounts, err := readMounts(pid)
	if err != nil {
		t.Fatal(err)
	}
	c.mounts = mounts
	for _, m := range mounts.mounts {
		k.mountIDs[uint64(m.ID)] = true
	}
	return k, pid
}

func open(t *testing.T, fd int, err error) *os.File {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "descriptor")
	t.Cleanup(func() { f.Close() })
	return f
}

func TestFilesOfTheContainer(t *testing.T) {
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	memfd, err := unix.MemfdCreate("memory", unix.MFD_CLOEXEC)
	files := []*os.File{open(t, memfd, err), open(t, pipe[0], nil), open(t, pipe[1], nil)}
	eventfd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	files = append(files, open(t, eventfd, err))
	socket, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	files = append(files, open(t, socket, err))
	zombie := exec.Command("true")
	if err := zombie.Start(); err != nil {
		t.Fatal(err)
	}
	pidfd, err := unix.PidfdOpen(zombie.Process.Pid, 0)
	files = append(files, open(t, pidfd, err))
	var info unix.Siginfo
	if err := unix.Waitid(unix.P_PID, zombie.Process.Pid, &info, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = zombie.Wait() })
	k, pid := holder(t, "exec 9</etc/passwd 8<. 7</proc/self/ns/mnt", 0, files...)
	own, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		t.Fatal(err)
	}
	k.spaces[own] = true // as if it were the container's
	if err := k.files(pid); err != nil {
		t.Fatal(err)
	}
	if len(k.findings()) > 0 {
		t.Errorf("findings %q", k.findings())
	}
}

func TestFilesOutsideOfTheContainer(t *testing.T) {
	file, err := os.Open("/etc/passwd")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	mnt, err := os.Open("/proc/self/ns/mnt")
	if err != nil {
		t.Fatal(err)
	}
	defer mnt.Close()
	raw, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP)
	socket := open(t, raw, err)
	pidfd, err := unix.PidfdOpen(os.Getpid(), 0)
	process := open(t, pidfd, err)
	want := []string{
		`has the descriptor 3 outside of the container ("/etc/passwd")`,
		"has the descriptor 4 of a namespace that is not the container's",
		"has the descriptor 5 of the kind RAW, for which the container lacks CAP_NET_RAW",
		"has the descriptor 6 of a process that is not the container's",
	}
	k, pid := holder(t, "", 0, file, mnt, socket, process)
	if err := k.files(pid); err != nil {
		t.Fatal(err)
	}
	if len(k.findings()) != len(want) {
		t.Fatalf("findings %q", k.findings())
	}
	for i, f := range k.findings() {
		if !strings.Contains(f, want[i]) {
			t.Errorf("finding %q lacks %q", f, want[i])
		}
	}
	if k, pid = holder(t, "", caps(capability.CAP_NET_RAW), socket); k.files(pid) != nil || len(k.findings()) > 0 {
		t.Errorf("a raw socket of a container that may have one: %q", k.findings())
	}
}

// Whoever gives a pod the right to ping gives it to all of its containers.
func TestPingSockets(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("makes a network namespace")
	}
	runtime.LockOSThread() // never unlocked: the thread exits with the test
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
	allow := func(groups string) {
		if err := os.WriteFile(PingGroups, []byte(groups), 0); err != nil {
			t.Fatal(err)
		}
	}
	allow("0 0")
	ping, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP)
	socket := open(t, ping, err)
	for _, tc := range []struct {
		groups string
		caps   set
		want   string
	}{
		{"1 0", 0, "has the descriptor 3 of the kind PING, for which the container lacks CAP_NET_RAW"},
		{"1 0", caps(capability.CAP_NET_RAW), ""},
		{"0 2147483647", 0, ""},
	} {
		allow(tc.groups)
		k, pid := holder(t, "", tc.caps, socket)
		if err := k.files(pid); err != nil {
			t.Fatal(err)
		}
		if text := strings.Join(k.findings(), "; "); text != tc.want && (tc.want == "" || !strings.HasSuffix(text, tc.want)) {
			t.Errorf("%+v: findings %q", tc, text)
		}
	}
}

// Whatever a process is in and executes must be the container's, too.
func TestProgramOutsideOfTheContainer(t *testing.T) {
	k, pid := holder(t, "", 0)
	clear(k.mountIDs)
	if err := k.files(pid); err != nil {
		t.Fatal(err)
	}
	for _, word := range []string{"has its root outside of the container", "has its working directory outside of", "has its program outside of", "has mapped a file outside of"} {
		if !strings.Contains(strings.Join(k.findings(), "; "), word) {
			t.Errorf("findings %q lack %q", k.findings(), word)
		}
	}
}
