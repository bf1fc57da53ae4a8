package guestagent

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/api"
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

func asContainer(t *testing.T) *container {
	t.Helper()
	init, err := newProcess(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	return &container{ID: "c1", Init: init}
}

func TestUndumpableUnixSocket(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root may enter a network namespace")
	}
	for name, kind := range map[string]int{"stream": unix.SOCK_STREAM, "datagram": unix.SOCK_DGRAM, "packets": unix.SOCK_SEQPACKET} {
		t.Run(name, func(t *testing.T) {
			c := asContainer(t)
			other := sleeper(t, kind)
			err := undumpableFiles(c, []int{c.Init.PID}, &api.CheckpointOptions{})
			if err == nil {
				t.Fatal("a connection to outside is not found")
			}
			for _, part := range []string{"sleep (pid", "outside of the container", "close the connection"} {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("%q lacks %q", err, part)
				}
			}
			if err := undumpableFiles(c, []int{c.Init.PID}, &api.CheckpointOptions{ExternalUnixSockets: true}); err != nil {
				t.Errorf("allowed, and refused: %v", err)
			}
			if err := undumpableFiles(c, []int{c.Init.PID, other}, &api.CheckpointOptions{}); err != nil {
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

func TestUndumpableSharedPIDNamespace(t *testing.T) {
	if os.Getpid() == 1 {
		t.Skip("this is the first process of its pid namespace")
	}
	c := asContainer(t) // in the pid namespace of whoever runs the test
	err := undumpable(c, []int{c.Init.PID}, &api.CheckpointOptions{})
	if err == nil || !strings.Contains(err.Error(), "pid namespace") {
		t.Errorf("a shared pid namespace: %v", err)
	}
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
	if got, err := hostname(os.Getpid()); err != nil || got != want {
		t.Errorf("hostname = %q, %v, want %q", got, err, want)
	}
}
