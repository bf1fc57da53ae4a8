// SPDX-License-Identifier: Apache-2.0

package inspect

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/procfs"
	"github.com/kata-checkpoint/kata-checkpoint/internal/testproc"
)

// wantRefusal checks this process, without and with what it says of itself.
func wantRefusal(t *testing.T, want string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("only root may enter a network namespace")
	}
	err := refusal(t, os.Getpid(), []int{os.Getpid()}, &api.CheckpointOptions{})
	if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
		t.Errorf("got %v, want a refusal with %q", err, want)
	}
}

// CRIU connects a unix socket again that has not been accepted, unless it has sent
// something or is closed.
func TestUnixConnectionsThatWait(t *testing.T) {
	for _, network := range []string{"unix", "unixpacket"} {
		t.Run(network, func(t *testing.T) {
			name := filepath.Join(t.TempDir(), "socket")
			l, err := net.Listen(network, name)
			must(t, err)
			defer l.Close()
			c, err := net.Dial(network, name)
			must(t, err)
			defer c.Close()
			wantRefusal(t, "")
			_, err = c.Write([]byte("data"))
			must(t, err)
			wantRefusal(t, "has sent data to a unix socket that has not accepted its connection yet")
			accepted, err := l.Accept()
			must(t, err)
			defer accepted.Close()
			wantRefusal(t, "")
			closed, err := net.Dial(network, name)
			must(t, err, closed.Close())
			wantRefusal(t, "has not accepted a connection of a unix socket yet that its client has closed")
			last, err := l.Accept()
			must(t, err, last.Close())
			wantRefusal(t, "")
		})
	}
}

// One that waits for a process that is not in the image set could not be connected
// again at all.
func TestUnixConnectionThatWaitsElsewhere(t *testing.T) {
	name := filepath.Join(t.TempDir(), "socket")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: name})
	must(t, err)
	l.SetUnlinkOnClose(false)
	file, err := l.File()
	must(t, err, l.Close())
	cmd := exec.Command("sh", "-c", "echo ready; read line")
	cmd.ExtraFiles = []*os.File{file}
	testproc.Ready(t, cmd)
	file.Close()
	c, err := net.Dial("unix", name)
	must(t, err)
	defer c.Close()
	wantRefusal(t, "has a unix socket that is connected to outside of the container, where the connection waits to be accepted")
	if err := refusal(t, os.Getpid(), []int{os.Getpid(), cmd.Process.Pid}, &api.CheckpointOptions{}); err != nil {
		t.Errorf("inside: %v", err)
	}
}

// CRIU reads what is unread, but not who has sent it.
func TestUnreadMessages(t *testing.T) {
	for name, option := range senderOptions {
		t.Run(name, func(t *testing.T) {
			pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			must(t, err)
			defer unix.Close(pair[0])
			defer unix.Close(pair[1])
			must(t, unix.Sendto(pair[0], []byte("data"), 0, nil))
			wantRefusal(t, "")
			if err := unix.SetsockoptInt(pair[1], unix.SOL_SOCKET, option, 1); err != nil {
				t.Skipf("this kernel has none: %v", err)
			}
			wantRefusal(t, "has a unix socket with the option SO_")
			_, _, err = unix.Recvfrom(pair[1], make([]byte, 16), 0)
			must(t, err)
			wantRefusal(t, "")
		})
	}
}

func TestNetlinkSocketWithUnreadMessages(t *testing.T) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	must(t, err)
	defer unix.Close(fd)
	wantRefusal(t, "")
	request := make([]byte, unix.SizeofNlMsghdr+unix.SizeofRtGenmsg+3)
	*(*unix.NlMsghdr)(unsafe.Pointer(&request[0])) = unix.NlMsghdr{Len: uint32(len(request)), Type: unix.RTM_GETLINK, Flags: unix.NLM_F_REQUEST | unix.NLM_F_DUMP}
	must(t, unix.Sendto(fd, request, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}))
	wantRefusal(t, "has a netlink socket with messages that it has not read")
}

func TestOnlyWhatIsOverInAMomentIsWaitedFor(t *testing.T) {
	busy, other := Finding{Class: Refused, Code: 2031}, Finding{Class: Refused, Code: 2001}
	stale := Finding{Class: Refused, Code: 2002, Stale: true}
	for i, tc := range []struct {
		findings []Finding
		passing  bool
	}{
		{nil, false},
		{[]Finding{{Class: Warning}}, false},
		{[]Finding{{Class: Warning}, busy}, true},
		{[]Finding{busy, other}, false},
		{[]Finding{stale, busy}, true},
		{[]Finding{other, stale}, false},
	} {
		if got := Passing(tc.findings); got != tc.passing {
			t.Errorf("%d: %t", i, got)
		}
	}
}

// A SIGTRAP may be pending for a process, as for one that is stopped, or for a
// thread that has it blocked.
func TestPendingSIGTRAPIsRefused(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	must(t, cmd.Start())
	defer func() { _ = cmd.Wait() }()
	defer func() { _ = cmd.Process.Kill() }()
	must(t, cmd.Process.Signal(unix.SIGSTOP))
	if processes(t, cmd.Process.Pid)[0].Trapped {
		t.Error("without a signal")
	}
	must(t, cmd.Process.Signal(unix.SIGUSR1), cmd.Process.Signal(unix.SIGTRAP))
	if !processes(t, cmd.Process.Pid)[0].Trapped {
		t.Error("pending for a process, and not found")
	}

	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var set, old unix.Sigset_t
	set.Val[0] = sigTrap
	must(t, unix.PthreadSigmask(unix.SIG_BLOCK, &set, &old))
	defer func() { _ = unix.PthreadSigmask(unix.SIG_SETMASK, &old, nil) }()
	must(t, unix.Tgkill(os.Getpid(), unix.Gettid(), unix.SIGTRAP))
	self := processes(t, os.Getpid())[0]
	if !self.Trapped {
		t.Error("pending for a thread, and not found")
	}
	wantRefusal(t, "has a SIGTRAP pending")
	// Delivered, it would end the test.
	fd, err := unix.Signalfd(-1, &set, unix.SFD_CLOEXEC)
	must(t, err)
	defer unix.Close(fd)
	_, err = unix.Read(fd, make([]byte, unsafe.Sizeof(unix.SignalfdSiginfo{})))
	must(t, err)
	wantRefusal(t, "")
}

func TestPipesInPacketMode(t *testing.T) {
	for flags, want := range map[int]string{unix.O_CLOEXEC: "", unix.O_CLOEXEC | unix.O_DIRECT: "has a pipe in packet mode"} {
		var fds [2]int
		must(t, unix.Pipe2(fds[:], flags))
		wantRefusal(t, want)
		unix.Close(fds[0])
		unix.Close(fds[1])
	}
}

// A pidfd comes back that is of a process in the image set, or of one that is
// gone.
func TestPidfds(t *testing.T) {
	start := func(args ...string) (*exec.Cmd, int) {
		cmd := exec.Command(args[0], args[1:]...)
		must(t, cmd.Start())
		fd, err := unix.PidfdOpen(cmd.Process.Pid, 0)
		must(t, err)
		return cmd, fd
	}
	gone, goneFD := start("true")
	must(t, gone.Wait())
	defer unix.Close(goneFD)
	child, childFD := start("sleep", "1000")
	defer func() { _ = child.Wait() }()
	defer func() { _ = child.Process.Kill() }()
	defer unix.Close(childFD)
	wantRefusal(t, "") // a child that was not listed yet
	fd, err := unix.PidfdOpen(os.Getppid(), 0)
	must(t, err)
	defer unix.Close(fd)
	wantRefusal(t, "has a pidfd open of a process that is not in the container")

	root, exec := &Process{PID: 1, PIDs: []int{1}, Name: "init"}, &Process{PID: 2, PIDs: []int{2}, Name: "exec", Exec: true}
	c := &Container{Root: root, Processes: []*Process{root}, Execs: []*Process{exec}}
	for target, want := range map[File]string{
		{Name: pidFD, Target: 1}:                      "",
		{Name: pidFD, Target: -1}:                     "",
		{Name: pidFD, Target: 2}:                      "the process exec (pid 2), which was started by an exec",
		{Name: pidFD, Target: 1, Flags: unix.O_EXCL}:  "a pidfd of a thread",
		{Name: "anon_inode:[eventfd]", Target: 12345}: "",
	} {
		if r := c.pidFile(target, map[int]bool{1: true}); (r.class == Refused) != (want != "") || !strings.Contains(r.what, want) {
			t.Errorf("%+v: %+v, want %q", target, r, want)
		}
	}
}

func TestDescends(t *testing.T) {
	cmd := exec.Command("sh", "-c", "sleep 1000 & echo ready; read line; kill $!")
	testproc.Ready(t, cmd)
	grandchild := children(t, cmd.Process.Pid)[0]
	stat, err := procfs.ReadStat(os.Getppid())
	must(t, err)
	for _, tc := range []struct {
		others map[int]bool
		want   bool
	}{
		{map[int]bool{cmd.Process.Pid: true}, true},
		{map[int]bool{os.Getpid(): true}, true},
		{map[int]bool{grandchild: true}, false},
		{map[int]bool{stat.Parent + 1<<22: true}, false},
	} {
		if got := descends(grandchild, tc.others); got != tc.want {
			t.Errorf("%v: %t", tc.others, got)
		}
	}
}
