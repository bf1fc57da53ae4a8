package inspect

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/procfs"
	"github.com/kata-checkpoint/kata-checkpoint/internal/testproc"
)

// sleeper is another process with the write end of a socket pair, whose other
// end the test has.
func sleeper(t *testing.T, kind int) int {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	outer := os.NewFile(uintptr(pair[1]), "outer")
	defer outer.Close()
	t.Cleanup(func() { unix.Close(pair[0]) })
	cmd := exec.Command("sleep", "1000")
	cmd.ExtraFiles = []*os.File{outer}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return cmd.Process.Pid
}

func TestUndumpableUnixSocket(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root may enter a network namespace")
	}
	for name, kind := range map[string]int{"stream": unix.SOCK_STREAM, "datagram": unix.SOCK_DGRAM, "packets": unix.SOCK_SEQPACKET} {
		t.Run(name, func(t *testing.T) {
			self := os.Getpid()
			other := sleeper(t, kind)
			err := undumpableFiles(self, []int{self}, nil, &api.CheckpointOptions{})
			if err == nil {
				t.Fatal("a connection to outside is not found")
			}
			for _, part := range []string{"sleep (pid", "outside of the container", "close the connection"} {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("%q lacks %q", err, part)
				}
			}
			if err := undumpableFiles(self, []int{self}, nil, &api.CheckpointOptions{ExternalUnixSockets: true}); err != nil {
				t.Errorf("allowed, and refused: %v", err)
			}
			if err := undumpableFiles(self, []int{self, other}, nil, &api.CheckpointOptions{}); err != nil {
				t.Errorf("both ends are in the container: %v", err)
			}
		})
	}
}

func TestUndumpableFile(t *testing.T) {
	for link, want := range map[string]string{
		"anon_inode:[io_uring]":  "without io_uring",
		"anon_inode:[eventpoll]": "",
		"/dev/tty":               "", // of a process that no such terminal controls
		"socket:[1]":             "",
	} {
		err := undumpableFile(os.Getpid(), link, nil)
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", link, err)
		}
	}
}

// In a pid namespace that is not the container's own, a process that has lost its
// parent is none that CRIU finds. Those that others started in it are none of
// the container's at all.
func TestUndumpableStrayedProcess(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to make a pid namespace")
	}
	// The first process of a pid namespace, and below it the container's.
	cmd := exec.Command("sh", "-c", `sh -c '(sleep 1000 & echo sleep $!); echo root $$; read line'; exit`)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID}
	out := testproc.Start(t, cmd)
	pids := map[string]int{"first": cmd.Process.Pid}
	lines := bufio.NewScanner(out)
	for len(pids) < 3 && lines.Scan() {
		var name string
		var inside int
		if _, err := fmt.Sscan(lines.Text(), &name, &inside); err != nil {
			t.Fatal(err)
		}
		pids[name] = outer(t, cmd.Process.Pid, inside)
	}
	for deadline := time.Now().Add(10 * time.Second); procfs.FirstLine(fmt.Sprintf("/proc/%d/comm", pids["sleep"])) != "sleep"; {
		if time.Now().After(deadline) {
			t.Fatal("it does not become sleep")
		}
	}
	if err := strayed(pids["root"], []int{pids["root"], pids["first"]}); err != nil {
		t.Errorf("nothing has strayed: %v", err)
	}
	err := strayed(pids["root"], []int{pids["root"], pids["sleep"]})
	if err == nil {
		t.Fatal("a process that has lost its parent is not found")
	}
	for _, part := range []string{"sleep (pid", "lost its parent", "pid namespace of its own"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q lacks %q", err, part)
		}
	}
}

// outer finds a process by its pid in another's pid namespace.
func outer(t *testing.T, other, inside int) int {
	t.Helper()
	entries, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(filepath.Base(e))
		if err != nil {
			t.Fatal(err)
		}
		if same, err := procfs.SameNamespace(pid, other, "pid"); err != nil || !same {
			continue
		}
		if pids, err := procfs.NSPIDs(pid); err == nil && pids[len(pids)-1] == inside {
			return pid
		}
	}
	t.Fatalf("no process has the pid %d there", inside)
	return 0
}

func TestSocketInode(t *testing.T) {
	for link, want := range map[string]uint32{"socket:[17]": 17, "socket:[0]": 0, "pipe:[17]": 0, "socket:[x]": 0, "socket:[4294967296]": 0} {
		got, ok := socketInode(link)
		if ok != (want != 0) || ok && got != want {
			t.Errorf("%s: %d, %t", link, got, ok)
		}
	}
}

func TestHostname(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root may enter a namespace")
	}
	want, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := Hostname(os.Getpid()); err != nil || got != want {
		t.Errorf("hostname = %q, %v, want %q", got, err, want)
	}
}
