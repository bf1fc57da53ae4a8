// SPDX-License-Identifier: Apache-2.0

package attributes

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/testproc"
)

const (
	plainMode   = "plain"
	changedMode = "changed"
)

func init() { runtime.LockOSThread() } // main runs on the main thread

// TestMain makes this program one with a thread beside its main one, where a test
// starts it as such: as they are when they are new, or with everything changed.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 && (os.Args[1] == plainMode || os.Args[1] == changedMode) {
		if err := hold(os.Args[1] == changedMode); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// Of the main thread and of another one.
var (
	ofMain  = map[string]string{cpus: "0", timerSlack: "123456", ioPriority: "16390", coredumpFilter: "0000007f"}
	ofOther = map[string]string{cpus: "1", timerSlack: "98765", ioPriority: "24576"}
)

func hold(changed bool) error {
	other := make(chan int)
	ready := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread belongs to it
		other <- unix.Gettid()
		ready <- change(changed, unix.Gettid(), ofOther)
		select {}
	}()
	tid := <-other
	if err := <-ready; err != nil {
		return err
	}
	if err := change(changed, os.Getpid(), ofMain); err != nil {
		return err
	}
	fmt.Printf("ready %d\n", tid)
	_, err := bufio.NewReader(os.Stdin).ReadString('\n')
	return err
}

func change(changed bool, tid int, to map[string]string) error {
	for name, value := range to {
		if !changed {
			return nil
		}
		if err := (&writer{}).applyThread(os.Getpid(), tid, name, value); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

// start starts such a program, and returns its PID and that of its thread.
func start(t *testing.T, mode string) (pid, tid int) {
	t.Helper()
	if runtime.NumCPU() < 2 {
		t.Skip("needs two CPUs")
	}
	cmd := exec.Command("/proc/self/exe", mode)
	line, err := testproc.Start(t, cmd).ReadString('\n')
	if _, e := fmt.Sscanf(line, "ready %d", &tid); e != nil {
		t.Skipf("there is no program %s: %s (%v)", mode, line, err)
	}
	return cmd.Process.Pid, tid
}

func read(t *testing.T, pid int) []*api.Attribute {
	t.Helper()
	look, err := inspect.LookAtFiles(t.Context(), pid, []int{pid}, nil)
	if err != nil {
		t.Fatal(err)
	}
	list, all, err := Read(t.Context(), look, "/")
	if err != nil || !all {
		t.Fatalf("all of it: %v, %v", all, err)
	}
	return list
}

// texts are attributes of the main thread and of the one with a PID.
func texts(list []*api.Attribute, tid int) []string {
	var out []string
	for _, a := range list {
		switch int(a.GetThread()) {
		case 0:
			out = append(out, fmt.Sprintf("main: %s=%s", a.GetName(), a.GetValue()))
		case tid:
			out = append(out, fmt.Sprintf("other: %s=%s", a.GetName(), a.GetValue()))
		}
	}
	slices.Sort(out)
	return out
}

// What was read of a process is the same after it was applied to another one.
func TestReadAndApply(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root may set all of it")
	}
	changed, thread := start(t, changedMode)
	plain, other := start(t, plainMode)
	if have := read(t, plain); len(have) > 0 {
		t.Errorf("new threads have %q", texts(have, other))
	}
	var want []string
	for name, value := range ofMain {
		want = append(want, "main: "+name+"="+value)
	}
	for name, value := range ofOther {
		want = append(want, "other: "+name+"="+value)
	}
	slices.Sort(want)
	list := read(t, changed)
	if have := texts(list, thread); !slices.Equal(have, want) {
		t.Errorf("read: %q, not %q", have, want)
	}
	list = slices.DeleteFunc(list, func(a *api.Attribute) bool { return a.GetThread() != 0 && int(a.GetThread()) != thread })
	for _, a := range list {
		a.Pid = number(plain)
		if a.GetThread() != 0 {
			a.Thread = number(other)
		}
	}
	failed, err := Apply(t.Context(), Target{PIDs: []int{plain}}, list)
	if err != nil || len(failed) > 0 {
		t.Errorf("not set: %v (%v)", failed, err)
	}
	if have := texts(read(t, plain), other); !slices.Equal(have, want) {
		t.Errorf("after it was applied there is %q, not %q", have, want)
	}
}

// Nothing of an image set is set that is not in the tables, has another value than
// they say, or needs a capability that the container lacks.
func TestApplyRefuses(t *testing.T) {
	pid, tid := start(t, plainMode)
	for name, a := range map[string]*api.Attribute{
		"an unknown name":         {Name: "dumpable", Value: "1"},
		"real time":               {Name: ioPriority, Value: "8192"},
		"no such class":           {Name: ioPriority, Value: "65535"},
		"no CPU":                  {Name: cpus, Value: ""},
		"a CPU that is not there": {Name: cpus, Value: "1000-1023"},
		"too high a CPU":          {Name: cpus, Value: "0-4096"},
		"a filter that is a path": {Name: coredumpFilter, Value: "../x"},
		"no slack":                {Name: timerSlack, Value: "0"},
		"another thread":          {Thread: 1, Name: timerSlack, Value: "7"},
		"another process":         {Pid: 1 << 30, Name: timerSlack, Value: "7"},
	} {
		t.Run(name, func(t *testing.T) {
			if a.Pid == 0 {
				a.Pid = number(pid)
			}
			failed, err := Apply(t.Context(), Target{PIDs: []int{pid}}, []*api.Attribute{a})
			if err != nil || len(failed) != 1 || !strings.Contains(failed[0].Error(), a.GetName()) {
				t.Errorf("%v: %v (%v)", a, failed, err)
			}
		})
	}
	if have := read(t, pid); len(have) > 0 {
		t.Errorf("there is %q", texts(have, tid))
	}
}
