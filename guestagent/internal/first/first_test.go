package first

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The first process takes no pid but its own, and leaves nothing of what ends as
// its child.
func TestRun(t *testing.T) {
	if runtime.GOARCH != "amd64" {
		t.Skip("Go's runtime has threads, which have pids")
	}
	if os.Getuid() != 0 {
		t.Skip("needs root to make a pid namespace")
	}
	if _, err := exec.LookPath("nsenter"); err != nil {
		t.Skip("needs nsenter(1)")
	}
	binary := filepath.Join(t.TempDir(), "agent")
	build := exec.Command("go", "build", "-ldflags=-E github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/entry.start", "-o", binary, "../../../cmd/kata-checkpoint-agent")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	cmd := exec.Command(binary, "first")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	pid := strconv.Itoa(cmd.Process.Pid)
	wait(t, "it does not ignore the ends of children", func() bool {
		ignored, err := strconv.ParseUint(status(t, pid, "SigIgn"), 16, 64)
		return err == nil && ignored&(1<<(syscall.SIGCHLD-1)) != 0 // others may be ignored from before
	})
	if n := status(t, pid, "Threads"); n != "1" {
		t.Errorf("it has %s threads", n)
	}
	out, err := exec.Command("nsenter", "--target", pid, "--pid", "sh", "-c", "(sleep 0.1 >/dev/null & echo $!)").Output()
	if err != nil {
		t.Fatal(err)
	}
	// The shell was the second, and what it left the third or fourth.
	if n, err := strconv.Atoi(strings.TrimSpace(string(out))); err != nil || n > 4 {
		t.Errorf("a pid is %q", out)
	}
	wait(t, "what has ended is not reaped", func() bool {
		children, err := os.ReadFile("/proc/" + pid + "/task/" + pid + "/children")
		return err == nil && len(children) == 0
	})
}

func status(t *testing.T, pid, name string) string {
	t.Helper()
	data, err := os.ReadFile("/proc/" + pid + "/status")
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
