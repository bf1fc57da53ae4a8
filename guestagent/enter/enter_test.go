package enter

import (
	"bufio"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// A process that is started inside of a container's namespaces is in each of
// them, the time namespace too, and is what the request says, no more.
func TestStart(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to make namespaces")
	}
	cgroup := t.TempDir() // stands for one: where it is a plain file, entering changes nothing
	if err := os.WriteFile(cgroup+"/cgroup.procs", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	target := startTarget(t)
	mask := uint32(0o027)
	for name, tc := range map[string]struct {
		process specs.Process
		want    string
		status  int
	}{
		"pid namespace": {specs.Process{Args: []string{"sh", "-c", "readlink /proc/self/ns/pid /proc/self/ns/uts /proc/self/ns/time"}},
			readLinks(t, target, "pid", "uts", "time"), 0},
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
			out, status := run(t, target, cgroup, tc.process)
			if out != tc.want || status.ExitStatus() != tc.status {
				t.Errorf("wrote %q and ended with %d, want %q and %d", out, status.ExitStatus(), tc.want, tc.status)
			}
		})
	}
	t.Run("missing command", func(t *testing.T) {
		null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer null.Close()
		p := specs.Process{Args: []string{"no-such-command"}}
		_, err = Start(Request{Target: target, Cgroup: cgroup, Stdio: [3]*os.File{null, null, null}, Process: &p})
		if err == nil || !strings.Contains(err.Error(), "executable file not found") {
			t.Errorf("Start = %v", err)
		}
	})
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
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stdin.Close(); _ = cmd.Wait() })
	if _, err := bufio.NewReader(stdout).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
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

func run(t *testing.T, target int, cgroup string, p specs.Process) (string, unix.WaitStatus) {
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
	pid, err := Start(Request{Target: target, Cgroup: cgroup, Stdio: [3]*os.File{null, write, os.Stderr}, Process: &p})
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
