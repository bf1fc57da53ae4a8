// SPDX-License-Identifier: Apache-2.0

package enter

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/testhelper"
	"github.com/kata-checkpoint/kata-checkpoint/internal/testfuse"
	"github.com/kata-checkpoint/kata-checkpoint/internal/testproc"
)

// A process that is started inside of a container's namespaces is in each of
// them, the time namespace too, and is what the request says, no more.
func TestStart(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to make namespaces")
	}
	cgroup := makeCgroup(t)
	target := startTarget(t)
	helper := testhelper.Build(t)
	// What the agent has open without close-on-exec reaches no process.
	stray, err := unix.Open("/dev/null", unix.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(stray)
	score := 123
	mask := uint32(0o027)
	for name, tc := range map[string]struct {
		process specs.Process
		want    string
		status  int
	}{
		"pid namespace": {specs.Process{Args: []string{"sh", "-c", "readlink /proc/self/ns/pid /proc/self/ns/uts /proc/self/ns/time"}},
			readLinks(t, target, "pid", "uts", "time"), 0},
		"cgroup": {specs.Process{Args: []string{"sh", "-c", "readlink /proc/self/ns/cgroup; grep ^0: /proc/self/cgroup"}},
			readLinks(t, target, "cgroup") + "0::/" + filepath.Base(cgroup) + "\n", 0},
		"exit status":   {specs.Process{Args: []string{"sh", "-c", "exit 7"}}, "", 7},
		"user":          {specs.Process{Args: []string{"sh", "-c", "id -u; id -g; umask"}, User: specs.User{UID: 65534, GID: 65534, AdditionalGids: []uint32{5}, Umask: &mask}}, "65534\n65534\n0027\n", 0},
		"no capability": {specs.Process{Args: []string{"grep", "CapEff", "/proc/self/status"}}, "CapEff:\t0000000000000000\n", 0},
		"capabilities": {specs.Process{Args: []string{"grep", "CapEff", "/proc/self/status"}, Capabilities: &specs.LinuxCapabilities{
			Bounding: []string{"CAP_CHOWN", "CAP_KILL"}, Permitted: []string{"CAP_CHOWN", "CAP_KILL"}, Effective: []string{"CAP_CHOWN", "CAP_KILL"}}}, "CapEff:\t0000000000000021\n", 0},
		"no new privileges": {specs.Process{Args: []string{"grep", "NoNewPrivs", "/proc/self/status"}, NoNewPrivileges: true}, "NoNewPrivs:\t1\n", 0},
		"limit":             {specs.Process{Args: []string{"sh", "-c", "ulimit -n"}, Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 77, Hard: 99}}}, "77\n", 0},
		"directory":         {specs.Process{Args: []string{"pwd"}, Cwd: "/usr"}, "/usr\n", 0},
		"OOM score":         {specs.Process{Args: []string{"cat", "/proc/self/oom_score_adj"}, OOMScoreAdj: &score}, "123\n", 0},
		"descriptors":       {specs.Process{Args: []string{"sh", "-c", "ls /proc/$$/fd; true"}}, "0\n1\n2\n", 0},
		"environment":       {specs.Process{Args: []string{"sh", "-c", "echo $A $HOME"}, Env: []string{"A=b", "PATH=/bin:/usr/bin"}}, "b /root\n", 0},
	} {
		t.Run(name, func(t *testing.T) {
			out, status := run(t, helper, target, cgroup, tc.process)
			if out != tc.want || status.ExitStatus() != tc.status {
				t.Errorf("wrote %q and ended with %d, want %q and %d", out, status.ExitStatus(), tc.want, tc.status)
			}
		})
	}
	t.Run("prepared and not seen", func(t *testing.T) {
		p, err := Prepare(request(t, target, cgroup, specs.Process{Args: []string{"echo", "never"}}))
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		if out, _ := run(t, helper, target, cgroup, specs.Process{Args: []string{"sh", "-c", "set -- /proc/[0-9]*; echo $#; n=0; while read pid; do n=$((n + 1)); done <" + cgroup + "/cgroup.procs; echo $n"}}); out != "2\n1\n" {
			t.Errorf("beside the one that is prepared there are %q processes", out)
		}
	})
	t.Run("seccomp", func(t *testing.T) {
		testSeccomp(t, helper, target, cgroup)
	})
	t.Run("init", func(t *testing.T) {
		testInit(t, helper, target, cgroup)
	})
	t.Run("terminal", func(t *testing.T) {
		testTerminal(t, helper, target, cgroup)
	})
	t.Run("missing command", func(t *testing.T) {
		null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer null.Close()
		p := specs.Process{Args: []string{"no-such-command"}}
		_, err = startOn(t, helper, request(t, target, cgroup, p), [3]*os.File{null, null, null})
		if err == nil || !strings.Contains(err.Error(), `"no-such-command": executable file not found`) {
			t.Errorf("Run = %v", err)
		}
	})
}

// An exec whose working directory never answers ends with its context, and leaves
// no process.
func TestAnExecThatCannotStartEndsWithItsContext(t *testing.T) {
	dir := t.TempDir()
	server := testfuse.Mount(t, dir)
	cgroup := makeCgroup(t)
	target := startTarget(t)
	helper := testhelper.Build(t)
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	testfuse.Stop(t, server)
	p, err := Prepare(request(t, target, cgroup, specs.Process{Args: []string{"true"}, Cwd: dir, Env: []string{"HOME=/"}}))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	ctx, cancel := context.WithTimeoutCause(t.Context(), 200*time.Millisecond, errors.New("too late"))
	defer cancel()
	testfuse.Ends(t, "an exec", func() {
		fd := int(null.Fd())
		if _, err := p.Run(ctx, helper, [3]int{fd, fd, fd}, nil); err == nil || !strings.Contains(err.Error(), "too late") {
			t.Errorf("Run = %v", err)
		}
	})
	waitEmpty(t, cgroup)
}

// No process in the container's PID namespace has more than the command, not even
// before it is the command: with CAP_SYS_PTRACE, others there could use it.
func TestAnExecHasNoMoreThanItsCommand(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to make namespaces")
	}
	dir := t.TempDir()
	server := testfuse.Mount(t, dir)
	cgroup := makeCgroup(t)
	target := startTarget(t)
	helper := testhelper.Build(t)
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	testfuse.Stop(t, server)
	p, err := Prepare(request(t, target, cgroup, specs.Process{Args: []string{"true"}, Cwd: dir, User: specs.User{UID: 65534, GID: 65534}, Env: []string{"HOME=/"}}))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		fd := int(null.Fd())
		_, err := p.Run(ctx, helper, [3]int{fd, fd, fd}, nil)
		done <- err
	}()
	for _, pid := range waitingFor(t, cgroup) {
		status, err := os.ReadFile("/proc/" + pid + "/status")
		if err != nil {
			t.Fatal(err)
		}
		fields := make(map[string]string)
		for line := range strings.Lines(string(status)) {
			key, value, _ := strings.Cut(line, ":")
			fields[key] = strings.TrimSpace(value)
		}
		inside := len(strings.Fields(fields["NSpid"])) > 1
		if inside && (fields["CapPrm"] != "0000000000000000" || !strings.HasPrefix(fields["Uid"], "65534\t65534\t65534\t")) {
			t.Errorf("it is\n%s", status)
		}
	}
	cancel()
	if err := <-done; err == nil {
		t.Error("it ran")
	}
	waitEmpty(t, cgroup)
}

// waitEmpty waits until a cgroup has no process.
func waitEmpty(t *testing.T, cgroup string) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); ; <-time.After(10 * time.Millisecond) {
		left, err := os.ReadFile(filepath.Join(cgroup, "cgroup.procs"))
		if err != nil {
			t.Fatal(err)
		}
		if len(left) == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the processes %q are left", left)
		}
	}
}

// waitingFor waits until a process of a cgroup waits for a file system, and
// returns all of them.
func waitingFor(t *testing.T, cgroup string) []string {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); <-time.After(5 * time.Millisecond) {
		pids, err := os.ReadFile(filepath.Join(cgroup, "cgroup.procs"))
		if err != nil {
			t.Fatal(err)
		}
		for pid := range strings.FieldsSeq(string(pids)) {
			stack, _ := os.ReadFile("/proc/" + pid + "/wchan")
			if strings.Contains(string(stack), "request_wait_answer") {
				return strings.Fields(string(pids))
			}
		}
	}
	t.Fatal("no process waits")
	return nil
}

// The pid of a process that has failed is found wherever it is in the report:
// one that nobody reaps keeps the container's PID namespace, and so the
// container, from ending.
func TestParse(t *testing.T) {
	p := &Prepared{command: "c"}
	for report, want := range map[string]struct {
		pid int
		err string
	}{
		"pid 7 \n":                             {7, ""},
		"pid 7 \nerrno 2 exec\n":               {7, `exec "c": executable file not found in the container`},
		"errno 2 exec\npid 7 \n":               {7, `exec "c": executable file not found in the container`},
		"errno 1 set the user\npid 7 \n":       {7, "exec: set the user: operation not permitted"},
		"errno 22 enter the container's uts\n": {0, "exec: enter the container's uts: invalid argument"},
		"":                                     {0, "exec: the new process exited before it ran"},
	} {
		pid, err := p.parse(report)
		text := ""
		if err != nil {
			text = err.Error()
		}
		if pid != want.pid || text != want.err {
			t.Errorf("parse(%q) = %d, %q, want %d, %q", report, pid, text, want.pid, want.err)
		}
	}
}

// testSeccomp checks that a process has its filters, all of them and in their
// order, with the privilege to set them and without.
func testSeccomp(t *testing.T, helper string, target int, cgroup string) {
	// The last filter that fails a call decides by which error.
	fail := func(call, errno uint32) []unix.SockFilter {
		return []unix.SockFilter{
			{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}, // the call's number
			{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: call, Jf: 1},
			{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | errno},
			{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
		}
	}
	filters := [][]unix.SockFilter{fail(unix.SYS_UNAME, uint32(unix.EXDEV)), fail(unix.SYS_UNAME, uint32(unix.EMLINK))}
	for _, noNewPrivileges := range []bool{true, false} {
		p := specs.Process{
			Args:            []string{"sh", "-c", "grep -E '^(Seccomp|Seccomp_filters|NoNewPrivs):' /proc/self/status; uname 2>&1"},
			NoNewPrivileges: noNewPrivileges, User: specs.User{UID: 65534, GID: 65534},
		}
		privs := map[bool]string{true: "1", false: "0"}[noNewPrivileges]
		out, _ := run(t, helper, target, cgroup, p, filters...)
		want := "NoNewPrivs:\t" + privs + "\nSeccomp:\t2\nSeccomp_filters:\t2\n"
		if !strings.HasPrefix(out, want) || !strings.Contains(out, "Too many links") {
			t.Errorf("it printed %q, not %q and that uname has too many links", out, want)
		}
	}
}

// testTerminal checks that a process has the terminal that is its stdio as its
// controlling one.
func testTerminal(t *testing.T, helper string, target int, cgroup string) {
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Skip("needs terminals: ", err)
	}
	ours := os.NewFile(uintptr(fd), "ptmx")
	defer ours.Close()
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	number, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := os.OpenFile("/dev/pts/"+strconv.Itoa(number), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.Close()
	// The session and the device number of the terminal (proc(5)). A pts has the
	// major number 136.
	p := specs.Process{Terminal: true, Env: []string{"PATH=/bin:/usr/bin"}, Args: []string{"cut", "-d", " ", "-f", "6,7", "/proc/self/stat"}}
	pid, err := startOn(t, helper, request(t, target, cgroup, p), [3]*os.File{theirs, theirs, theirs})
	if err != nil {
		t.Fatal(err)
	}
	defer reap(pid)
	line, err := bufio.NewReader(ours).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	session, terminal, _ := strings.Cut(strings.TrimSpace(line), " ")
	if want := strconv.FormatUint(unix.Mkdev(136, uint32(number)), 10); session == "0" || terminal != want {
		t.Errorf("its session is %s and its terminal %s, want %s", session, terminal, want)
	}
}

// testInit checks that an init is PID 1 of a PID namespace below the target's,
// takes no pid but its own, leaves no zombies, and cannot be looked into.
func testInit(t *testing.T, helper string, target int, cgroup string) {
	if _, err := exec.LookPath("nsenter"); err != nil {
		t.Skip("needs nsenter(1)")
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	stdio := [3]*os.File{null, null, null}
	r := request(t, target, cgroup, specs.Process{Cwd: "/no-such-directory"})
	r.Init = true
	if _, err := startOn(t, helper, r, stdio); err == nil || !strings.Contains(err.Error(), "working directory: no such file") {
		t.Errorf("one that fails: %v", err)
	}
	r = request(t, target, cgroup, specs.Process{NoNewPrivileges: true})
	r.Init = true
	inside, err := startOn(t, helper, r, stdio)
	if err != nil {
		t.Fatal(err)
	}
	pid := find(t, cgroup, inside)
	defer func() {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Error(err)
		}
		wait(t, "it does not end", func() bool { return unix.Kill(pid, 0) != nil })
	}()
	proc := "/proc/" + strconv.Itoa(pid)
	for name, want := range map[string]string{"Threads": "1", "CapPrm": "0000000000000000", "NoNewPrivs": "1"} {
		if have := status(t, pid, name); have != want {
			t.Errorf("%s is %q, want %q", name, have, want)
		}
	}
	// Whoever has the same user and capabilities might, if it was dumpable.
	if _, ended := run(t, helper, target, cgroup, specs.Process{Args: []string{"cat", "/proc/" + strconv.Itoa(inside) + "/status"}}); ended.ExitStatus() != 0 {
		t.Errorf("the container does not see it: %d", ended)
	}
	if out, ended := run(t, helper, target, cgroup, specs.Process{Args: []string{"cat", "/proc/" + strconv.Itoa(inside) + "/environ"}}); ended.ExitStatus() == 0 {
		t.Errorf("the container can look into it: %q", out)
	}
	if fds, err := os.ReadDir(proc + "/fd"); err != nil || len(fds) != 3 {
		t.Errorf("its descriptors are %v, %v", fds, err)
	}
	out, err := exec.Command("nsenter", "--target", strconv.Itoa(pid), "--pid", "sh", "-c", "(sleep 0.1 >/dev/null & echo $!)").Output()
	if err != nil {
		t.Fatal(err)
	}
	// The shell was the second, and what it left the third or fourth.
	if n, err := strconv.Atoi(strings.TrimSpace(string(out))); err != nil || n < 2 || n > 4 {
		t.Errorf("a pid is %q", out)
	}
	wait(t, "what has ended is not reaped", func() bool {
		children, err := os.ReadFile(proc + "/task/" + strconv.Itoa(pid) + "/children")
		return err == nil && len(children) == 0
	})
}

// find returns the pid of the process in a cgroup that is PID 1 of its namespace
// and has a pid in the one above.
func find(t *testing.T, cgroup string, above int) int {
	t.Helper()
	procs, err := os.ReadFile(filepath.Join(cgroup, "cgroup.procs"))
	if err != nil {
		t.Fatal(err)
	}
	for field := range strings.FieldsSeq(string(procs)) {
		pid, err := strconv.Atoi(field)
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(status(t, pid, "NSpid"), "\t"+strconv.Itoa(above)+"\t1") {
			return pid
		}
	}
	t.Fatalf("none of %q has the pid %d", procs, above)
	return 0
}

func status(t *testing.T, pid int, name string) string {
	t.Helper()
	data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if value, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.TrimSpace(value)
		}
	}
	t.Fatalf("no %s", name)
	return ""
}

func wait(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !done(); {
		if time.Now().After(deadline) {
			t.Fatal(what)
		}
	}
}

func readLinks(t *testing.T, pid int, kinds ...string) string {
	t.Helper()
	var out strings.Builder
	for _, k := range kinds {
		l, err := os.Readlink("/proc/" + strconv.Itoa(pid) + "/ns/" + k)
		if err != nil {
			t.Fatal(err)
		}
		out.WriteString(l + "\n")
	}
	return out.String()
}

// startTarget starts a process in namespaces of its own, time included, and
// returns its pid.
func startTarget(t *testing.T) int {
	t.Helper()
	if _, err := exec.LookPath("unshare"); err != nil {
		t.Skip("needs unshare(1)")
	}
	cmd := exec.Command("unshare", "--mount", "--uts", "--ipc", "--cgroup", "--time", "--pid", "--fork", "--mount-proc", "sh", "-c", "echo ready; read line")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	testproc.Ready(t, cmd)
	children, err := os.ReadFile("/proc/" + strconv.Itoa(cmd.Process.Pid) + "/task/" + strconv.Itoa(cmd.Process.Pid) + "/children")
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(children)))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

// makeCgroup makes a cgroup below that of this process.
func makeCgroup(t *testing.T) string {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	_, path, _ := strings.Cut("\n"+string(own), "\n0::")
	path, _, _ = strings.Cut(path, "\n")
	for line := range strings.Lines(string(mounts)) {
		if fields := strings.Fields(line); len(fields) > 2 && fields[2] == "cgroup2" {
			dir, err := os.MkdirTemp(filepath.Join(fields[1], path), "enter-test-")
			if err != nil {
				t.Skip("needs to make cgroups: ", err)
			}
			t.Cleanup(func() {
				if err := os.Remove(dir); err != nil {
					t.Error(err)
				}
			})
			return dir
		}
	}
	t.Skip("needs cgroup v2")
	return ""
}

// startOn is what the agent does, all at once.
func startOn(t *testing.T, helper string, r Request, stdio [3]*os.File, filters ...[]unix.SockFilter) (int, error) {
	t.Helper()
	p, err := Prepare(r)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	return p.Run(t.Context(), helper, [3]int{int(stdio[0].Fd()), int(stdio[1].Fd()), int(stdio[2].Fd())}, filters)
}

func request(t *testing.T, target int, cgroup string, p specs.Process) Request {
	t.Helper()
	data, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	return Request{Target: target, Cgroup: cgroup, Process: data}
}

func run(t *testing.T, helper string, target int, cgroup string, p specs.Process, filters ...[]unix.SockFilter) (string, unix.WaitStatus) {
	t.Helper()
	if p.Env == nil {
		p.Env = []string{"PATH=/bin:/usr/bin"}
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	pid, err := startOn(t, helper, request(t, target, cgroup, p), [3]*os.File{null, write, os.Stderr}, filters...)
	write.Close()
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	if _, err := bufio.NewReader(read).WriteTo(&out); err != nil {
		t.Fatal(err)
	}
	var ws unix.WaitStatus
	if _, err := unix.Wait4(pid, &ws, 0, nil); err != nil {
		t.Fatal(err)
	}
	return out.String(), ws
}
