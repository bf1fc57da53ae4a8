package enter

import (
	"bufio"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/testproc"
)

// spawnMode makes this test's binary a spawner.
const spawnMode = "spawn"

func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == spawnMode {
		os.Exit(Serve())
	}
	os.Exit(m.Run())
}

// A process that is started inside of a container's namespaces is in each of
// them, the time namespace too, and is what the request says, no more.
func TestStart(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to make namespaces")
	}
	cgroup := makeCgroup(t)
	target := startTarget(t)
	binary := "/proc/self/exe"
	if runtime.GOARCH == "amd64" {
		binary = build(t)
	}
	testStart(t, []string{binary, spawnMode}, target, cgroup)
}

// build makes the guest's binary as the Makefile does.
func build(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "agent")
	cmd := exec.Command("go", "build", "-ldflags=-E github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/entry.start", "-o", path, "../../../cmd/kata-checkpoint-agent")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return path
}

func testStart(t *testing.T, command []string, target int, cgroup string) {
	var process *exec.Cmd
	spawner := &Spawner{Command: func() (*exec.Cmd, error) {
		process = exec.Command(command[0], command[1:]...)
		return process, nil
	}}
	t.Cleanup(spawner.Close)
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
		"environment":       {specs.Process{Args: []string{"sh", "-c", "echo $A $HOME"}, Env: []string{"A=b", "PATH=/bin:/usr/bin"}}, "b /root\n", 0},
	} {
		t.Run(name, func(t *testing.T) {
			out, status := run(t, spawner, target, cgroup, tc.process)
			if out != tc.want || status.ExitStatus() != tc.status {
				t.Errorf("wrote %q and ended with %d, want %q and %d", out, status.ExitStatus(), tc.want, tc.status)
			}
		})
	}
	t.Run("spawner that has ended", func(t *testing.T) {
		end(t, spawner, process)
		if out, _ := run(t, spawner, target, cgroup, specs.Process{Args: []string{"echo", "again"}}); out != "again\n" {
			t.Errorf("wrote %q", out)
		}
	})
	t.Run("waits unseen", func(t *testing.T) {
		e, err := spawner.Enter(request(t, target, cgroup, specs.Process{Args: []string{"echo", "never"}}))
		if err != nil {
			t.Fatal(err)
		}
		defer e.Close()
		// The next one has waited for its own turn, and for the answers of that.
		if out, _ := run(t, spawner, target, cgroup, specs.Process{Args: []string{"sh", "-c", "ls -d /proc/[0-9]* | wc -l; cat " + cgroup + "/cgroup.procs | wc -l"}}); out != "4\n3\n" {
			t.Errorf("beside the one that waits there are %q processes", out)
		}
	})
	t.Run("first of a pid namespace", func(t *testing.T) {
		testFirst(t, spawner, target, cgroup)
	})
	t.Run("missing command", func(t *testing.T) {
		null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer null.Close()
		p := specs.Process{Args: []string{"no-such-command"}}
		_, err = startOn(t, spawner, request(t, target, cgroup, p), [3]*os.File{null, null, null})
		if err == nil || !strings.Contains(err.Error(), "executable file not found") {
			t.Errorf("Start = %v", err)
		}
	})
}

// testFirst checks that a process becomes the first of a pid namespace below the
// target's, and that a failure is told as for any other.
func testFirst(t *testing.T, spawner *Spawner, target int, cgroup string) {
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	r := request(t, target, cgroup, specs.Process{Args: []string{"sh", "-c", "echo $$; grep NSpid /proc/self/status; read line"}, Env: []string{"PATH=/bin:/usr/bin"}})
	r.First = true
	stdin, end, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer end.Close()
	inside, err := startOn(t, spawner, r, [3]*os.File{stdin, write, os.Stderr})
	write.Close()
	stdin.Close()
	if err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(read)
	if pid, err := lines.ReadString('\n'); err != nil || pid != "1\n" {
		t.Errorf("its pid is %q, %v", pid, err)
	}
	// As the target's /proc has them: grep's own.
	pids, err := lines.ReadString('\n')
	if fields := strings.Fields(pids); err != nil || len(fields) != 3 || fields[2] != "2" {
		t.Errorf("the pids of its child are %q, %v", pids, err)
	}
	if inside < 2 {
		t.Errorf("its pid in the target's namespace is %d", inside)
	}
	r = request(t, target, cgroup, specs.Process{Args: []string{"no-such-command"}})
	r.First = true
	if _, err := startOn(t, spawner, r, [3]*os.File{end, end, end}); err == nil || !strings.Contains(err.Error(), "executable file not found") {
		t.Errorf("a missing command: %v", err)
	}
}

// end kills a spawner's process and waits until it has lost its connection.
func end(t *testing.T, s *Spawner, cmd *exec.Cmd) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	fds := []unix.PollFd{{Fd: int32(s.conn.Fd()), Events: unix.POLLIN}}
	if n, err := unix.Poll(fds, 10000); n != 1 || err != nil {
		t.Fatalf("the spawner lives on: %d, %v", n, err)
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
func startOn(t *testing.T, spawner *Spawner, r Request, stdio [3]*os.File) (int, error) {
	t.Helper()
	e, err := spawner.Enter(r)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	return e.Run([3]int{int(stdio[0].Fd()), int(stdio[1].Fd()), int(stdio[2].Fd())})
}

func request(t *testing.T, target int, cgroup string, p specs.Process) Request {
	t.Helper()
	data, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	return Request{Target: target, Cgroup: cgroup, Process: data}
}

func run(t *testing.T, spawner *Spawner, target int, cgroup string, p specs.Process) (string, unix.WaitStatus) {
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
	pid, err := startOn(t, spawner, request(t, target, cgroup, p), [3]*os.File{null, write, os.Stderr})
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
