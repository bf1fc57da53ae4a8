// SPDX-License-Identifier: Apache-2.0

package inspect

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/testproc"
)

func TestNestedNamespaces(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("makes namespaces: only as root")
	}
	for name, tc := range map[string]struct {
		flags uintptr
		want  string
	}{
		"none":    {},
		"mount":   {flags: unix.CLONE_NEWNS},
		"cgroup":  {flags: unix.CLONE_NEWCGROUP},
		"network": {unix.CLONE_NEWNET, "is in a network namespace of its own"},
		"user":    {unix.CLONE_NEWUSER, "is in a user namespace of its own"},
		"PID":     {unix.CLONE_NEWPID, "is in a PID namespace of its own"},
		"UTS":     {unix.CLONE_NEWUTS, "is in a UTS namespace of its own"},
		"IPC":     {unix.CLONE_NEWIPC, "is in an IPC namespace of its own"},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := exec.Command("/bin/sh", "-c", "echo ready; read line")
			cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: tc.flags}
			testproc.Ready(t, cmd)
			err := refusal(t, os.Getpid(), []int{os.Getpid(), cmd.Process.Pid}, &api.CheckpointOptions{ExternalUnixSockets: true, TcpEstablished: true})
			if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
		})
	}
}

// Time namespaces are for what a process starts.
func TestTimeNamespace(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("makes namespaces: only as root")
	}
	cmd := exec.Command("unshare", "--time", "--fork", "sh", "-c", "echo ready; read line")
	testproc.Ready(t, cmd)
	self, pids := os.Getpid(), append(children(t, cmd.Process.Pid), os.Getpid(), cmd.Process.Pid)
	err := refusal(t, self, pids, &api.CheckpointOptions{TcpEstablished: true})
	if err == nil || !strings.Contains(err.Error(), "the process sh (") || !strings.Contains(err.Error(), "is in a time namespace of its own") || !strings.Contains(err.Error(), "has made a time namespace") {
		t.Errorf("got %v", err)
	}
}

// CRIU is told to take another cgroup namespace for init's.
func TestCgroupNamespaces(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("makes a namespace: only as root")
	}
	pids := []int{os.Getpid()}
	for _, flags := range []uintptr{0, unix.CLONE_NEWCGROUP} {
		cmd := exec.Command("/bin/sh", "-c", "echo ready; read line")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags}
		testproc.Ready(t, cmd)
		pids = append(pids, cmd.Process.Pid)
	}
	c, err := Look(t.Context(), pids[0], pids, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := c.CgroupNamespaces(); !slices.Equal(got, pids[2:]) {
		t.Errorf("got %v, want %v", got, pids[2:])
	}
}

func TestMappedIOUringIsRefused(t *testing.T) {
	p := &Process{PID: 10, PIDs: []int{10, 1}, Name: "db", Mappings: []Mapping{{Path: "anon_inode:[io_uring]"}}}
	c := &Container{Root: p, Processes: []*Process{p}}
	findings, err := c.Check(nil, &api.CheckpointOptions{ExternalUnixSockets: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := Refusal(findings); err == nil || !strings.Contains(err.Error(), "db (pid 1) uses io_uring") {
		t.Errorf("got %v", err)
	}
}

func TestTracedProcessIsRefused(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true}
	runtime.LockOSThread() // the tracer is the thread that forked
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		t.Skipf("this machine lets nobody trace: %v", err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	err := refusal(t, os.Getpid(), []int{os.Getpid(), cmd.Process.Pid}, &api.CheckpointOptions{ExternalUnixSockets: true, TcpEstablished: true})
	if err == nil || !strings.Contains(err.Error(), "is traced by the process") {
		t.Errorf("got %v", err)
	}
}

// A process whose main thread has exited is a zombie in /proc, with threads.
func TestProcessWithoutItsMainThread(t *testing.T) {
	const source = `
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
static void *work(void *arg) { puts("ready"); fflush(stdout); while (getchar() != EOF); exit(0); return arg; }
int main(void) { pthread_t t; pthread_create(&t, 0, work, 0); pthread_exit(0); }
`
	program := filepath.Join(t.TempDir(), "headless")
	build := exec.Command("gcc", "-pthread", "-x", "c", "-o", program, "-")
	build.Stdin = strings.NewReader(source)
	if out, err := build.CombinedOutput(); err != nil {
		t.Skipf("this machine has no C compiler: %v: %s", err, out)
	}
	cmd := exec.Command(program)
	testproc.Ready(t, cmd)
	for p := processes(t, cmd.Process.Pid); !p[0].Headless; p = processes(t, cmd.Process.Pid) {
		if t.Context().Err() != nil {
			t.Fatalf("got %+v", p[0])
		}
		runtime.Gosched()
	}
	err := refusal(t, os.Getpid(), []int{os.Getpid(), cmd.Process.Pid}, &api.CheckpointOptions{ExternalUnixSockets: true, TcpEstablished: true})
	if err == nil || !strings.Contains(err.Error(), "main thread has exited") {
		t.Errorf("got %v", err)
	}
}
