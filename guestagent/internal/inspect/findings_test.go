// SPDX-License-Identifier: Apache-2.0

package inspect

import (
	"bufio"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/containerd/errdefs"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
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

// refusal is the error of a check of a container with these processes.
func refusal(t *testing.T, root int, pids []int, o *api.CheckpointOptions) error {
	t.Helper()
	c, err := Look(t.Context(), root, pids, nil)
	if err != nil {
		t.Fatal(err)
	}
	findings, err := c.Check(nil, o)
	if err != nil {
		t.Fatal(err)
	}
	// The test's own threads are in other namespaces for a moment.
	return Refusal(slices.DeleteFunc(findings, func(f Finding) bool { return f.Code == errcode.ThreadApart }))
}

func TestExternalUnixSocketIsRefused(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root may enter a network namespace")
	}
	for name, kind := range map[string]int{"stream": unix.SOCK_STREAM, "datagram": unix.SOCK_DGRAM, "packets": unix.SOCK_SEQPACKET} {
		t.Run(name, func(t *testing.T) {
			self := os.Getpid()
			other := sleeper(t, kind)
			err := refusal(t, self, []int{self}, &api.CheckpointOptions{})
			if err == nil {
				t.Fatal("a connection to outside is not found")
			}
			for _, part := range []string{"sleep (pid", "outside of the container", "close the connection"} {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("%q lacks %q", err, part)
				}
			}
			// CRIU finds a peer by its name.
			if err := refusal(t, self, []int{self}, &api.CheckpointOptions{ExternalUnixSockets: true}); err == nil {
				t.Error("a connection that CRIU cannot make again is allowed")
			}
			if err := refusal(t, self, []int{self, other}, &api.CheckpointOptions{}); err != nil {
				t.Errorf("both ends are in the container: %v", err)
			}
		})
	}
}

// A datagram socket is connected again by the peer's name, if the caller allows
// it.
func TestExternalDatagramSocket(t *testing.T) {
	name := filepath.Join(t.TempDir(), "socket")
	bound, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name})
	if err != nil {
		t.Fatal(err)
	}
	file, err := bound.File()
	if err != nil {
		t.Fatal(err)
	}
	bound.Close()
	cmd := exec.Command("sh", "-c", "echo ready; read line")
	cmd.ExtraFiles = []*os.File{file}
	testproc.Ready(t, cmd)
	file.Close()
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: name})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	self := os.Getpid()
	if err := refusal(t, self, []int{self}, &api.CheckpointOptions{}); err == nil {
		t.Error("it is not found")
	}
	if err := refusal(t, self, []int{self}, &api.CheckpointOptions{ExternalUnixSockets: true}); err != nil {
		t.Errorf("allowed, and refused: %v", err)
	}
}

// A process of an exec is not part of a checkpoint, so that what it has is no
// obstacle; what it shares with the container's own processes is one.
func TestExecs(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	client, err := net.Dial("tcp4", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	start := func(sockets ...*os.File) *exec.Cmd {
		cmd := exec.Command("sh", "-c", "sleep 1000 & echo ready; read line; kill $!")
		cmd.ExtraFiles = sockets
		testproc.Ready(t, cmd)
		for _, f := range sockets {
			f.Close()
		}
		return cmd
	}
	tcp := func(c net.Conn) *os.File {
		defer c.Close()
		f, err := c.(*net.TCPConn).File()
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	root := start(os.NewFile(uintptr(pair[0]), ""), tcp(server)).Process.Pid
	other := start(os.NewFile(uintptr(pair[1]), ""), tcp(client)).Process.Pid
	var pids []int
	for _, pid := range []int{root, other} {
		pids = append(append(pids, pid), children(t, pid)...)
	}
	c, err := Look(t.Context(), root, pids, nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(pids) != 4 || len(c.Processes) != 2 || len(c.Execs) != 2 || c.Root.Exec || !c.Execs[0].Exec || c.Execs[0].PID != other {
		t.Fatalf("of %v, %d are the container's and %d of an exec", pids, len(c.Processes), len(c.Execs))
	}
	name := fmt.Sprintf("the process sh (pid %d), which was started by an exec and is not part of a checkpoint", other)
	for o, want := range map[*api.CheckpointOptions]map[string]int{
		{}:                     {"unix socket that is connected to " + name: 1, ", to " + name + ": repeat the checkpoint once the exec has ended": 1, "; ": 1},
		{TcpEstablished: true}: {", to " + name: 1, "; ": 1},
		{TcpClose: true}:       {"unix socket": 1, "TCP": 0},
	} {
		findings, err := c.Check(nil, o)
		if err != nil {
			t.Fatal(err)
		}
		text := Refusal(findings).Error()
		for part, times := range want {
			if n := strings.Count(text, part); n != times {
				t.Errorf("%v: %q is said %d times in %q", o, part, n, text)
			}
		}
	}
	// What it has open besides is no obstacle; CRIU stops it all the same.
	c.Execs[0].Files = append(c.Execs[0].Files, File{Name: "anon_inode:[io_uring]"})
	c.Execs[0].Tracer = root
	findings, err := c.Check(nil, &api.CheckpointOptions{TcpClose: true})
	if err != nil {
		t.Fatal(err)
	}
	if text := Refusal(findings).Error(); strings.Contains(text, "io_uring") || !strings.Contains(text, "is traced by") {
		t.Errorf("an exec with io_uring that is traced: %q", text)
	}
	if n := len(slices.DeleteFunc(findings, func(f Finding) bool {
		return f.Class != Warning || !strings.HasPrefix(f.What, "was started by an exec")
	})); n != 2 {
		t.Errorf("there are %d warnings of processes of an exec", n)
	}
}

// Files of /proc come back where their processes do, before there are threads.
func TestFilesOfProc(t *testing.T) {
	root := &Process{PID: 100, PIDs: []int{100, 7, 1}, Name: "init"}
	other := &Process{PID: 105, PIDs: []int{105, 11, 30}, Name: "other", Exec: true}
	c := &Container{Root: root, Processes: []*Process{root}, Execs: []*Process{other}}
	for name, want := range map[string]string{
		"/proc/1/status": "", "/proc/1/task/1/status": "", "/proc/1/task": "", "/proc/self": "", "/proc/sys/kernel/pid_max": "", "/proc/9/stat": "", "/proc/1/net/tcp": "", "/data/proc/1/task/2/stat": "",
		"/proc/1/task/2/status": "of a thread", "/proc/1/task/2": "of a thread",
		"/proc/30/status": "the process other (pid 30), which was started by an exec", "/proc/30": "the process other (pid 30)",
	} {
		r := c.procFile(File{Name: name})
		if (r.class == Refused) != (want != "") || !strings.Contains(r.what, want) {
			t.Errorf("%s: %+v, want %q", name, r, want)
		}
	}
}

// children lists those of a process.
func children(t testing.TB, pid int) (out []int) {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		t.Fatal(err)
	}
	for field := range strings.FieldsSeq(string(data)) {
		child, err := strconv.Atoi(field)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, child)
	}
	return out
}

func TestClassify(t *testing.T) {
	const terminal = 0x8803
	stdio := []*api.Stdio{{Key: "pipe:[5]"}, {Key: "tty[8803:17]"}}
	for _, tc := range []struct {
		name     string
		terminal uint64
		class    Class
		text     string
	}{
		{"anon_inode:[io_uring]", 0, Refused, "without io_uring"},
		{"anon_inode:[eventpoll]", 0, Good, ""},
		{"anon_inode:inotify", 0, Good, ""},
		{"anon_inode:[invented]", 0, Unknown, "anon_inode:[invented]"},
		{"/dev/tty", terminal, Refused, "without a terminal"},
		{"/dev/tty", terminal + 1, Good, ""}, // of a session that the workload made
		{"/dev/tty", 0, Good, ""},
		{"/etc/passwd", terminal, Good, ""},
		{"socket:[1]", 0, Good, ""},
		{"pipe:[1]", 0, Good, ""},
	} {
		r := classify(&Process{Terminal: tc.terminal}, File{Name: tc.name}, stdio)
		if r.class != tc.class || !strings.Contains(r.what+r.advice, tc.text) {
			t.Errorf("%s at terminal %x: %+v", tc.name, tc.terminal, r)
		}
	}
}

// A process is named as its container knows it, each thing is said once, and
// everything is said at once.
func TestRefusal(t *testing.T) {
	root := &Process{PID: 100, PIDs: []int{100, 7, 1}, Name: "init"}
	child := &Process{PID: 103, PIDs: []int{103, 9, 2}, Name: "child", Files: []File{{Name: "anon_inode:[io_uring]"}, {Name: "anon_inode:[io_uring]"}, {Name: "anon_inode:[invented]"}}}
	other := &Process{PID: 105, PIDs: []int{105, 11}, Name: "other", Files: []File{{Name: "anon_inode:[io_uring]"}}}
	c := &Container{Root: root, Processes: []*Process{root, child, other}}
	for i := range 3 {
		remote := netip.AddrPortFrom(netip.MustParseAddr("10.0.0.1"), uint16(5000+i))
		c.Connections = append(c.Connections, Connection{PID: 103, FD: i, Local: netip.MustParseAddrPort("10.0.0.2:80"), Remote: remote})
	}
	// Nobody has to say what becomes of one with both ends in the container.
	loopback := netip.MustParseAddrPort("127.0.0.1:80")
	c.Connections = append(c.Connections, Connection{PID: 100, FD: 5, Local: loopback, Remote: loopback, Inside: true})
	findings, err := c.Check(nil, &api.CheckpointOptions{})
	if err != nil {
		t.Fatal(err)
	}
	err = Refusal(findings)
	if err == nil {
		t.Fatal("nothing is refused")
	}
	for part, times := range map[string]int{
		"the process child (pid 2) uses io_uring":                1,
		"the process other (pid 105 in the guest) uses io_uring": 1,
		"child (pid 2) has an open TCP connection from 10.0.0.2:80 to 10.0.0.1:5000 outside of the container, and 2 more: close it": 1, "127.0.0.1": 0,
		"kata-checkpoint.dev/tcp": 1, "invented": 0, "\n": 0, "; ": 2,
	} {
		if n := strings.Count(err.Error(), part); n != times {
			t.Errorf("%q is said %d times in %q", part, n, err)
		}
	}
	if !errdefs.IsFailedPrecondition(err) {
		t.Errorf("its class is %v", errdefs.Resolve(err))
	}
	for _, o := range []*api.CheckpointOptions{{TcpEstablished: true}, {TcpClose: true}} {
		findings, err := c.Check(nil, o)
		if err != nil {
			t.Fatal(err)
		}
		if err := Refusal(findings); strings.Contains(err.Error(), "TCP") {
			t.Errorf("with %v: %v", o, err)
		}
		warned := slices.ContainsFunc(findings, func(f Finding) bool {
			return f.Class == Warning && strings.Contains(f.String(), "closed after the restore")
		})
		if warned != o.GetTcpClose() {
			t.Errorf("with %v: warned %t", o, warned)
		}
	}
	many := slices.Repeat(findings[:1], maxQuoted+3)
	if text := Refusal(many).Error(); !strings.HasSuffix(text, "; and 3 more like these") || strings.Count(text, "; ") != maxQuoted {
		t.Errorf("many findings: %q", text)
	}
	if err := Refusal(nil); err != nil {
		t.Errorf("no findings: %v", err)
	}
}

// In a PID namespace that is not the container's own, CRIU does not find a
// process that has lost its parent. Processes that others started there are not
// the container's.
func TestOrphanIsRefused(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to create a PID namespace")
	}
	// The init of a PID namespace, and below it the container's root.
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
	for deadline := time.Now().Add(10 * time.Second); Name(pids["sleep"]) != "sleep"; {
		if time.Now().After(deadline) {
			t.Fatal("it does not become sleep")
		}
	}
	if err := refusal(t, pids["root"], []int{pids["root"], pids["first"]}, &api.CheckpointOptions{}); err != nil {
		t.Errorf("there is no orphan: %v", err)
	}
	err := refusal(t, pids["root"], []int{pids["root"], pids["sleep"]}, &api.CheckpointOptions{})
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

func TestAnonymousDescriptors(t *testing.T) {
	for name, want := range map[string]Class{
		"[eventfd]": Good, "inotify": Good, "[io_uring]": Refused, "bpf-map": Refused, "bpf-prog": Refused, "[something-new]": Unknown,
		"[perf_event]": Refused, "[userfaultfd]": Refused, "[fscontext]": Refused,
	} {
		r := classify(&Process{}, File{Name: anonInode + name}, nil)
		if r.class != want || want == Refused && r.advice == "" {
			t.Errorf("%s: %+v", name, r)
		}
	}
}

// While its processes run, a connection that they have just accepted looks like
// one to somebody else in the same guest. Another look tells; one to elsewhere is
// refused at once.
func TestConnectionThatWasJustAccepted(t *testing.T) {
	here := Connection{PID: 1, FD: 3, Local: netip.MustParseAddrPort("127.0.0.1:50000"), Remote: netip.MustParseAddrPort("127.0.0.1:80"), Here: true}
	elsewhere, toExec := here, here
	elsewhere.Here = false
	toExec.Exec = &Process{PID: 9, PIDs: []int{9}, Name: "sh"}
	for name, tc := range map[string]struct {
		connections []Connection
		passing     bool
	}{
		"to somebody in the guest": {[]Connection{here, here}, true},
		"to another machine":       {[]Connection{elsewhere}, false},
		"to both":                  {[]Connection{here, elsewhere}, false},
		"to an exec":               {[]Connection{toExec}, false},
	} {
		t.Run(name, func(t *testing.T) {
			root := &Process{PID: 1, PIDs: []int{1}, Name: "init"}
			c := &Container{Root: root, Processes: []*Process{root}, Connections: tc.connections}
			findings, err := c.Check(nil, &api.CheckpointOptions{})
			if err != nil || Refusal(findings) == nil {
				t.Fatalf("it is not refused: %v", err)
			}
			if Passing(findings) != tc.passing {
				t.Errorf("%v: passing is %t", findings, !tc.passing)
			}
		})
	}
}
