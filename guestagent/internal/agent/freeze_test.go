// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/cgroup"
	"github.com/kata-checkpoint/kata-checkpoint/guestagent/internal/inspect"
	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/testfuse"
	"github.com/kata-checkpoint/kata-checkpoint/internal/testproc"
)

// cgroupOf makes a cgroup of version 2 with processes.
func cgroupOf(t *testing.T, pids ...int) string {
	t.Helper()
	root := t.TempDir()
	if err := unix.Mount("cgroup2", root, "cgroup2", 0, ""); err != nil {
		t.Skip("needs to mount cgroup v2: ", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(root, unix.MNT_DETACH) })
	dir, err := os.MkdirTemp(root, "agent-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cgroup.Remove(context.Background(), dir) })
	for _, pid := range pids {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// adopted is an agent with one container of processes, of which the first is
// its init.
func adopted(t *testing.T, pids ...int) (*Agent, *container) {
	t.Helper()
	a := &Agent{dir: t.TempDir()}
	a.leases.begin("shim")
	if err := os.Mkdir(filepath.Join(a.dir, "containers"), 0o700); err != nil {
		t.Fatal(err)
	}
	init, err := newProcess(pids[0])
	if err != nil {
		t.Fatal(err)
	}
	c := &container{ID: "c1", Owner: "shim", Init: init, Cgroup: cgroupOf(t, pids...)}
	mounts, err := inspect.Mounts(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range mounts {
		c.Mounts = append(c.Mounts, inspect.NewPoint(m))
	}
	if err := a.save(c); err != nil {
		t.Fatal(err)
	}
	return a, c
}

func isFrozen(t *testing.T, c *container) bool {
	t.Helper()
	frozen, err := cgroup.Frozen(c.tree())
	if err != nil {
		t.Fatal(err)
	}
	return frozen
}

// A container that serves a file system to itself is frozen with its server,
// refused a checkpoint, and thawed.
func TestAContainerThatServesAFileSystemIsFrozenAndThawed(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, testfuse.Name)
	user := exec.Command("sh", "-c", "echo ready; until [ -e "+file+" ]; do sleep 0.05; done; exec 5<>"+file+"; echo open; read line")
	out := testproc.Start(t, user)
	if _, err := out.ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	a, c := adopted(t, user.Process.Pid) // created before anything is mounted
	server := testfuse.Mount(t, dir)
	if err := os.WriteFile(filepath.Join(c.Cgroup, "cgroup.procs"), []byte(strconv.Itoa(server.Pid)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := out.ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cgroup.Thaw(c.tree()) })
	r := &api.ContainerRequest{ContainerId: c.ID}
	testfuse.Ends(t, "a freeze", func() {
		if _, err := a.Freeze(t.Context(), r); err != nil {
			t.Error(err)
		}
	})
	if !isFrozen(t, c) {
		t.Error("it is not frozen")
	}
	testfuse.Ends(t, "a checkpoint", func() {
		_, _, err := a.inspect(t.Context(), c, &api.CheckpointRequest{})
		if err == nil || !strings.Contains(err.Error(), "has mounted a file system of the type fuse at "+dir) {
			t.Error(err)
		}
	})
	testfuse.Ends(t, "a thaw", func() {
		if _, err := a.Thaw(t.Context(), r); err != nil {
			t.Error(err)
		}
	})
	if isFrozen(t, c) {
		t.Error("it is still frozen")
	}
}

// sleeping is a container of one process.
func sleeping(t *testing.T) (*Agent, *container) {
	t.Helper()
	cmd := exec.Command("sh", "-c", "echo ready; read line")
	testproc.Ready(t, cmd)
	return adopted(t, cmd.Process.Pid)
}

// A Thaw thaws at once while a Freeze waits for what nobody answers, and the
// Freeze, when it comes back, has not frozen anything.
func TestAThawDoesNotWaitForAFreeze(t *testing.T) {
	a, c := sleeping(t)
	// A Freeze that has frozen the processes and is stuck.
	ctx, end, err := a.ops.begin(t.Context(), c.ID, freezing)
	if err != nil {
		t.Fatal(err)
	}
	if err := cgroup.Freeze(ctx, c.tree()); err != nil {
		t.Fatal(err)
	}
	testfuse.Ends(t, "a thaw", func() {
		if _, err := a.Thaw(t.Context(), &api.ContainerRequest{ContainerId: c.ID}); err != nil {
			t.Error(err)
		}
	})
	if isFrozen(t, c) {
		t.Error("it is still frozen")
	}
	if err := a.ops.complete(ctx, func() {}); !errors.Is(err, errThawed) {
		t.Errorf("the freeze is complete: %v", err)
	}
	end()
}

// A Freeze that was sent before a Thaw and is handled after it freezes nothing: its
// caller is no longer there.
func TestAFreezeThatComesAfterItsThaw(t *testing.T) {
	a, c := sleeping(t)
	request := func(turn uint64) *api.ContainerRequest { return &api.ContainerRequest{ContainerId: c.ID, Turn: turn} }
	if _, err := a.Thaw(t.Context(), request(2)); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Freeze(t.Context(), request(1)); err == nil || !strings.Contains(err.Error(), "thawed meanwhile") {
		t.Errorf("a freeze that is over: %v", err)
	}
	if isFrozen(t, c) {
		t.Error("it is frozen")
	}
	if _, err := a.Freeze(t.Context(), request(3)); err != nil || !isFrozen(t, c) {
		t.Errorf("the next freeze: %v", err)
	}
	if _, err := a.Thaw(t.Context(), request(4)); err != nil || isFrozen(t, c) {
		t.Errorf("the next thaw: %v", err)
	}
}

// A Thaw ends a dump, and waits for that end: CRIU may be at work.
func TestAThawEndsADump(t *testing.T) {
	a, c := sleeping(t)
	ctx, end, err := a.ops.begin(t.Context(), c.ID, dumping)
	if err != nil {
		t.Fatal(err)
	}
	if err := cgroup.Freeze(ctx, c.tree()); err != nil {
		t.Fatal(err)
	}
	r := &api.ContainerRequest{ContainerId: c.ID}
	short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := a.Thaw(short, r); err == nil || !isFrozen(t, c) {
		t.Errorf("thawed during a dump: %v", err)
	}
	if !errors.Is(context.Cause(ctx), errThawed) {
		t.Error("the dump is not told")
	}
	done := make(chan error)
	go func() { _, err := a.Thaw(t.Context(), r); done <- err }()
	end()
	if err := <-done; err != nil || isFrozen(t, c) {
		t.Errorf("not thawed after the dump: %v", err)
	}
}

// A container whose shim is gone is thawed, however long that takes, but not
// once its shim has come back while the agent waited. Another process of the host
// that holds a lease does not count, except for a shim of the release before.
func TestAnOrphanIsThawedUnlessAnOwnerComes(t *testing.T) {
	for name, tc := range map[string]struct {
		owner  string
		comes  []string
		frozen bool
	}{
		"nobody comes":                    {owner: "shim"},
		"its owner comes":                 {"shim", []string{"shim"}, true},
		"somebody else comes":             {"shim", []string{"other"}, false},
		"somebody without a name":         {"shim", []string{""}, false},
		"nobody comes, without an owner":  {},
		"anybody comes, without an owner": {"", []string{"other"}, true},
	} {
		t.Run(name, func(t *testing.T) {
			a, c := sleeping(t)
			a.leases.expired = a.thawAll
			c.Owner = tc.owner
			if err := a.save(c); err != nil {
				t.Fatal(err)
			}
			if _, err := a.Freeze(t.Context(), &api.ContainerRequest{ContainerId: c.ID}); err != nil {
				t.Fatal(err)
			}
			_, end, err := a.ops.begin(t.Context(), c.ID, change) // keeps it waiting
			if err != nil {
				t.Fatal(err)
			}
			a.leases.end("shim", 0)
			ticks := time.NewTicker(5 * time.Millisecond)
			defer ticks.Stop()
			for range 10 {
				if <-ticks.C; !isFrozen(t, c) {
					t.Fatal("thawed during an operation")
				}
			}
			for _, owner := range tc.comes {
				a.leases.begin(owner)
			}
			end()
			for range 100 {
				if !isFrozen(t, c) {
					break
				}
				<-ticks.C
			}
			if have := isFrozen(t, c); have != tc.frozen {
				t.Errorf("frozen: %v", have)
			}
		})
	}
}

// vforks starts a program that forks by vfork: many times, to execute another
// program 2 ms later, or once. That child exits once the program's stdin has
// ended, or after so many microseconds.
func vforks(t *testing.T, rounds, micros string) *exec.Cmd {
	t.Helper()
	source, program := filepath.Join(t.TempDir(), "vfork.c"), filepath.Join(t.TempDir(), "vfork")
	const code = `
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>
int main(int argc, char **argv)
{
	for (long i = 0, n = atol(argv[1]); i < n; i++) {
		char c;
		if (!vfork()) {
			if (!i && write(1, "ready\n", 6) < 0) _exit(1);
			if (n > 1) { usleep(2000); execl("/bin/true", "true", (char *)0); }
			if (atol(argv[2])) usleep(atol(argv[2]));
			else if (read(0, &c, 1) < 0) _exit(1);
			_exit(0);
		}
		while (wait(0) > 0);
		usleep(2000);
	}
	for (;;) pause();
}
`
	if err := os.WriteFile(source, []byte(code), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("cc", "-w", "-o", program, source).CombinedOutput(); err != nil {
		t.Skipf("needs a C compiler: %v: %s", err, out)
	}
	if err := exec.Command("/bin/true").Run(); err != nil { // the first time, it is read from a disk
		t.Fatal(err)
	}
	cmd := exec.Command(program, rounds, micros)
	testproc.Ready(t, cmd)
	return cmd
}

// A container is not left frozen while one of its processes has just been made by
// vfork, unless that lasts; then a checkpoint is refused.
func TestFreezeWaitsForVfork(t *testing.T) {
	cmd := vforks(t, "100000", "0")
	_, c := adopted(t, cmd.Process.Pid)
	ticks := time.NewTicker(3 * time.Millisecond)
	defer ticks.Stop()
	hits := 0
	for range 100 {
		<-ticks.C
		if err := cgroup.Freeze(t.Context(), c.tree()); err != nil {
			t.Fatal(err)
		}
		forking, err := c.forking()
		if err != nil {
			t.Fatal(err)
		}
		if forking {
			hits++
		}
		if err := errors.Join(cgroup.Thaw(c.tree()), c.freeze(t.Context())); err != nil {
			t.Fatal(err)
		}
		if forking, err := c.forking(); err != nil || forking {
			t.Errorf("it is frozen in a vfork (%v)", err)
		}
		if err := cgroup.Thaw(c.tree()); err != nil {
			t.Fatal(err)
		}
	}
	if hits == 0 {
		t.Skip("no moment within a vfork was met")
	}
	t.Logf("%d of 100 moments were within a vfork", hits)
}

// vforked returns the child of a process that has made one.
func vforked(t *testing.T, pid int) (child int) {
	t.Helper()
	for child == 0 {
		data, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "task", strconv.Itoa(pid), "children"))
		if err != nil {
			t.Fatal(err)
		}
		child, _ = strconv.Atoi(strings.TrimSpace(string(data)))
	}
	return child
}

// A program that takes a while to be executed, as from a file system that must
// read it first, is waited for.
func TestFreezeWaitsForASlowVfork(t *testing.T) {
	cmd := vforks(t, "1", "400000")
	_, c := adopted(t, cmd.Process.Pid, vforked(t, cmd.Process.Pid))
	if err := c.freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cgroup.Thaw(c.tree()) }()
	if forking, err := c.forking(); err != nil || forking {
		t.Errorf("it is frozen in a vfork (%v)", err)
	}
}

func TestLongVforkIsRefused(t *testing.T) {
	cmd := vforks(t, "1", "0")
	child := vforked(t, cmd.Process.Pid)
	_, c := adopted(t, cmd.Process.Pid, child)
	if err := c.freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cgroup.Thaw(c.tree()) }()
	if !isFrozen(t, c) {
		t.Error("it is not frozen")
	}
	look, err := inspect.Look(t.Context(), cmd.Process.Pid, []int{cmd.Process.Pid, child}, c.Mounts)
	if err != nil {
		t.Fatal(err)
	}
	if err := inspect.Refusal(look.Forking()); err == nil || !strings.Contains(err.Error(), "vfork (pid ") || !strings.Contains(err.Error(), "repeat the checkpoint") {
		t.Errorf("it is not refused: %v", err)
	}
}

// A dump thaws its container itself, unless somebody has interrupted it, and no
// Freeze of an earlier turn follows. What fails afterwards freezes it again.
func TestThawAfterADump(t *testing.T) {
	a, c := sleeping(t)
	t.Cleanup(func() { _ = cgroup.Thaw(c.tree()) })
	request := &api.ContainerRequest{ContainerId: c.ID, Turn: 3}
	if _, err := a.Freeze(t.Context(), request); err != nil {
		t.Fatal(err)
	}

	ctx, end, err := a.ops.begin(t.Context(), c.ID, dumping)
	if err != nil {
		t.Fatal(err)
	}
	a.ops.interrupt(c.ID, errThawed, dumping)
	if err := a.thawDumped(ctx, c, 4); !errors.Is(err, errThawed) || !isFrozen(t, c) {
		t.Errorf("interrupted: %v, frozen %t", err, isFrozen(t, c))
	}
	end()

	ctx, end, err = a.ops.begin(t.Context(), c.ID, dumping)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.thawDumped(ctx, c, 5); err != nil || isFrozen(t, c) {
		t.Errorf("%v, frozen %t", err, isFrozen(t, c))
	}
	if err := stayFrozen(c); err != nil || !isFrozen(t, c) {
		t.Errorf("after a failure: %v, frozen %t", err, isFrozen(t, c))
	}
	end()
	if _, err := a.Freeze(t.Context(), request); err == nil || !strings.Contains(err.Error(), "thawed meanwhile") {
		t.Errorf("a Freeze of an earlier turn: %v", err)
	}
}
