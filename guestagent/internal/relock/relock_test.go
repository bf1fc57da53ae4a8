// SPDX-License-Identifier: Apache-2.0

package relock

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const childVariable = "RELOCK_TEST_FILE"

func TestMain(m *testing.M) {
	if path := os.Getenv(childVariable); path != "" {
		if err := child(path); err != nil {
			fmt.Println("failed:", err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// child maps a file, has it open as well, and counts aloud. Its other threads
// compute and sleep, with signals all the time.
func child(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	if _, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		return err
	}
	for range 3 {
		go func() {
			runtime.LockOSThread()
			for n := uint64(1); ; n++ {
				if n*(n+1)/2-n*(n-1)/2 != n {
					fmt.Println("failed: a register has changed")
				}
				if n%1000000 == 0 {
					_ = unix.Nanosleep(&unix.Timespec{Nsec: 1e6}, nil)
				}
			}
		}()
	}
	for n := 1; ; n++ {
		started := time.Now()
		if err := unix.Nanosleep(&unix.Timespec{Nsec: 20e6}, nil); err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		fmt.Println("round", n, f.Fd(), time.Since(started) > 0)
	}
}

// A process that maps a file gets its locks back, whatever its threads do, and
// keeps running.
func TestProcess(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childVariable+"="+path)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = cmd.Process.Kill(), cmd.Wait() }()
	pid := cmd.Process.Pid
	lines := bufio.NewScanner(out)
	last, fd := 0, 0
	rounds := func(more int) {
		t.Helper()
		for range more {
			if !lines.Scan() {
				t.Fatal("it has exited")
			}
			n := 0
			if _, err := fmt.Sscanf(lines.Text(), "round %d %d true", &n, &fd); err != nil || n != last+1 {
				t.Fatalf("after round %d: %q", last, lines.Text())
			}
			last = n
		}
	}
	rounds(3)
	want := []Lock{{fd, unix.F_WRLCK, 120, 1}, {fd, unix.F_RDLCK, 0, 7}, {fd, unix.F_RDLCK, 1000, 0}}
	if lost := Lost(pid, want); fmt.Sprint(lost) != fmt.Sprint(want) {
		t.Fatalf("lost are %v, not %v", lost, want)
	}
	// It runs only for its calls.
	stopped := func() {
		entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/stat", pid, e.Name()))
			if err != nil || !strings.Contains(string(stat), ") t ") {
				t.Errorf("a thread is not stopped: %s (%v)", stat, err)
			}
		}
	}
	run := func(while func() error) error {
		stopped()
		defer stopped()
		return while()
	}
	for range 20 {
		if err := Process(pid, want, run); err != nil {
			t.Fatal(err)
		}
		rounds(2)
	}
	if lost := Lost(pid, want); len(lost) > 0 {
		t.Errorf("lost are %v", lost)
	}
	have := locksOf(t, pid)
	for _, text := range []string{"WRITE 120 120", "READ 0 6", "READ 1000 EOF"} {
		if !have[text] {
			t.Errorf("the lock %s is missing in %v", text, have)
		}
	}
	// Another process's lock is in the way: an error names it, and the process
	// keeps running.
	other, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := unix.FcntlFlock(other.Fd(), unix.F_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Start: 500, Len: 1}); err != nil {
		t.Fatal(err)
	}
	if err := Process(pid, []Lock{{fd, unix.F_WRLCK, 500, 1}}, run); !errors.Is(err, unix.EAGAIN) || !strings.Contains(err.Error(), "1 bytes from 500") {
		t.Errorf("a lock that another process has: %v", err)
	}
	rounds(3)
}

// locksOf are the POSIX locks of a process, by their type, start and end.
func locksOf(t *testing.T, pid int) map[string]bool {
	t.Helper()
	data, err := os.ReadFile("/proc/locks")
	if err != nil {
		t.Fatal(err)
	}
	out := make(map[string]bool)
	for line := range strings.Lines(string(data)) {
		if f := strings.Fields(line); len(f) == 8 && f[1] == "POSIX" && f[4] == strconv.Itoa(pid) {
			out[strings.Join([]string{f[3], f[6], f[7]}, " ")] = true
		}
	}
	return out
}
