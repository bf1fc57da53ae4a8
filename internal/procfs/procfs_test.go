// SPDX-License-Identifier: Apache-2.0

package procfs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/testproc"
)

func TestParseStat(t *testing.T) {
	const tail = " S 7 1 5 34816 -1 4194304 1 2 3 4 5 6 7 8 20 0 1 0 123456789012 8 9\n"
	for name, tc := range map[string]struct {
		in   string
		want Stat
		err  string
	}{
		"a process":                     {in: "12 (cat)" + tail, want: Stat{Name: "cat", State: 'S', Parent: 7, Session: 5, Terminal: 34816, StartTime: 123456789012}},
		"a name with spaces":            {in: "12 (a b c)" + tail, want: Stat{Name: "a b c", State: 'S', Parent: 7, Session: 5, Terminal: 34816, StartTime: 123456789012}},
		"a name that looks like fields": {in: "12 (x) Z 1 (y)" + tail, want: Stat{Name: "x) Z 1 (y", State: 'S', Parent: 7, Session: 5, Terminal: 34816, StartTime: 123456789012}},
		"a terminal with a high number": {in: strings.Replace("12 (cat)"+tail, "34816", "-2147449851", 1), want: Stat{Name: "cat", State: 'S', Parent: 7, Session: 5, Terminal: 0x80008405, StartTime: 123456789012}},
		"empty":                         {in: "", err: "no command"},
		"cut off":                       {in: "12 (cat) S 7 1", err: "3 fields"},
		"no numbers":                    {in: strings.Replace("12 (cat)"+tail, "123456789012", "x", 1), err: "invalid syntax"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := parseStat([]byte(tc.in))
			if tc.err != "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) {
					t.Fatalf("error %v lacks %q", err, tc.err)
				}
				return
			}
			if err != nil || got != tc.want {
				t.Errorf("got %+v, %v; want %+v", got, err, tc.want)
			}
		})
	}
}

// A process is looked at while it runs, before it is reaped, and after.
func TestLifeOfAProcess(t *testing.T) {
	dir := t.TempDir()
	cmd := exec.Command("sh", "-c", "echo ready; read line", "an argument")
	cmd.Dir = dir
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
	pid := cmd.Process.Pid
	if _, err := stdout.Read(make([]byte, 8)); err != nil {
		t.Fatal(err)
	}
	start, err := StartTime(pid)
	if err != nil {
		t.Fatal(err)
	}
	st, err := ReadStat(pid)
	if err != nil || st.Parent != os.Getpid() || st.Exited() {
		t.Errorf("while it runs: %+v, %v", st, err)
	}
	if !Is(pid, start) || !Runs(pid, start) || Is(pid, start+1) || Runs(pid, start+1) {
		t.Error("it is not told from a process that started at another time")
	}
	if args, err := Cmdline(pid); err != nil || !slices.Equal(args, []string{"sh", "-c", "echo ready; read line", "an argument"}) {
		t.Errorf("command line %q, %v", args, err)
	}
	if !WorksIn(pid, dir) || WorksIn(pid, filepath.Dir(dir)) {
		t.Error("its working directory is not recognized")
	}
	if name := FirstLine(path(pid, "comm")); name != "sh" {
		t.Errorf("comm is %q", name)
	}

	stdin.Close()
	// It exits, and is a zombie until Wait.
	var info unix.Siginfo
	if err := unix.Waitid(unix.P_PID, pid, &info, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
	if st, err = ReadStat(pid); err != nil || !st.Exited() {
		t.Errorf("a zombie: %+v, %v", st, err)
	}
	if !Is(pid, start) || Runs(pid, start) {
		t.Error("a zombie runs, or is another process")
	}
	_ = cmd.Wait()
	if _, err := ReadStat(pid); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a process that was reaped: %v", err)
	}
	if Is(pid, start) || Runs(pid, start) {
		t.Error("a process that was reaped is still there")
	}
}

func TestStatus(t *testing.T) {
	own := os.Getpid()
	if name, err := Status(own, "Pid"); err != nil || name != FirstLine("/proc/self/stat")[:len(name)] {
		t.Errorf("Pid is %q, %v", name, err)
	}
	if _, err := Status(own, "NoSuchField"); err == nil || !strings.Contains(err.Error(), "NoSuchField") {
		t.Errorf("an unknown field: %v", err)
	}
	pids, err := NSPIDs(own)
	if err != nil || pids[0] != own {
		t.Errorf("NSPIDs %v, %v", pids, err)
	}
}

func TestNamespaces(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("makes namespaces, which takes root")
	}
	cmd := exec.Command("unshare", "--pid", "--fork", "--kill-child", "sh", "-c", "echo ready; read line")
	testproc.Ready(t, cmd)
	for kind, want := range map[string]bool{"pid_for_children": false, "mnt": true} {
		same, err := SameNamespace(os.Getpid(), cmd.Process.Pid, kind)
		if err != nil || same != want {
			t.Errorf("%s: the same %t, %v", kind, same, err)
		}
	}
}

func TestMaps(t *testing.T) {
	cmd := exec.Command("/bin/sh", "-c", "echo ready; read line")
	testproc.Ready(t, cmd)
	var shell, other unix.Stat_t
	for path, st := range map[string]*unix.Stat_t{fmt.Sprintf("/proc/%d/exe", cmd.Process.Pid): &shell, "/proc/self/exe": &other} {
		if err := unix.Stat(path, st); err != nil {
			t.Fatal(err)
		}
	}
	if !Maps(cmd.Process.Pid, shell.Dev, shell.Ino) {
		t.Error("a process does not map its executable")
	}
	if Maps(cmd.Process.Pid, other.Dev, other.Ino) || Maps(cmd.Process.Pid, shell.Dev+1, shell.Ino) {
		t.Error("a process maps the executable of another")
	}
	if Maps(1<<30, shell.Dev, shell.Ino) {
		t.Error("no process maps a file")
	}
}

func TestStarted(t *testing.T) {
	before := time.Now()
	cmd := exec.CommandContext(t.Context(), "sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	got, err := Started("/proc", cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	// Boot time is in whole seconds.
	if got.Before(before.Add(-2*time.Second)) || got.After(time.Now().Add(2*time.Second)) {
		t.Errorf("a process that started at %v has started at %v", before, got)
	}
	if _, err := Started("/proc", -1); err == nil {
		t.Error("a process that does not exist has started")
	}
	if _, err := Started(t.TempDir(), 1); err == nil {
		t.Error("without procfs a process has started")
	}
}

func TestTaskStatus(t *testing.T) {
	dir, err := OpenDir(os.Getpid(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	for _, name := range []string{"status", "task/" + strconv.Itoa(os.Getpid()) + "/status"} {
		s, err := dir.TaskStatus(name)
		if err != nil || s.PIDs[0] != os.Getpid() || s.Threads < 2 || s.Tracer != 0 {
			t.Errorf("%s: %+v, %v", name, s, err)
		}
	}
	data := []byte("Name:\ta\nTracerPid:\t7\nNSpid:\t12\t3\nThreads:\t2\nSigPnd:\t0000000000000010\nShdPnd:\t0000000000000200\n")
	s, err := parseStatus(data, 12)
	if want := (TaskStatus{PIDs: []int{12, 3}, Tracer: 7, Threads: 2, Pending: 0x210}); err != nil || !reflect.DeepEqual(s, want) {
		t.Errorf("%+v, %v", s, err)
	}
	for _, data := range []string{"", "NSpid:\n", "NSpid:\t1\nTracerPid:\tx\n", "NSpid:\t1\nSigPnd:\tg\n"} {
		if s, err := parseStatus([]byte(data), 12); err == nil {
			t.Errorf("%q: %+v", data, s)
		}
	}
}
