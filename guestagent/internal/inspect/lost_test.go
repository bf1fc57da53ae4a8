// SPDX-License-Identifier: Apache-2.0

package inspect

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/api"
	"github.com/kata-checkpoint/kata-checkpoint/internal/testproc"
)

const holdMode = "hold"

// holds are what the test's program has where it was started to hold it. It opens
// a descriptor, or changes the thread that it runs on.
var holds = map[string]func() error{
	"a thread":                 func() error { return nil },
	"descriptors of a thread":  func() error { return unix.Unshare(unix.CLONE_FILES) },
	"a thread's directory":     func() error { return unix.Unshare(unix.CLONE_FS) },
	"a thread's UTS namespace": func() error { return unix.Unshare(unix.CLONE_NEWUTS) },
	"SCHED_FIFO":               func() error { return policy(unix.SCHED_FIFO) },
	"SCHED_DEADLINE":           func() error { return policy(schedDeadline) },
	"an eventfd":               func() error { return second(unix.Eventfd(5, 0)) },
	"an eventfd of semaphores": eventSemaphore,
	"a timerfd":                func() error { return second(unix.TimerfdCreate(unix.CLOCK_BOOTTIME, 0)) },
	"a timerfd of an alarm":    func() error { return second(unix.TimerfdCreate(unix.CLOCK_BOOTTIME_ALARM, 0)) },
	"a pressure file":          func() error { return second(unix.Open("/proc/pressure/cpu", unix.O_RDONLY, 0)) },
	"a pressure trigger":       func() error { return second(unix.Open("/proc/pressure/cpu", unix.O_RDWR, 0)) },
	"a socket":                 func() error { return socket(false) },
	"a socket's path":          func() error { return socket(true) },
	"memory":                   func() error { return second(unix.MemfdCreate("memory", 0)) },
	"secret memory":            func() error { return second(unix.MemfdSecret(0)) },
	"inotify":                  func() error { return watch(false) },
	"inotify, unread":          func() error { return watch(true) },
}

func second(_ int, err error) error { return err }

func policy(number uint32) error {
	a := unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: number, Priority: 1}
	if number == schedDeadline {
		a.Priority, a.Runtime, a.Deadline, a.Period = 0, 1e6, 1e8, 1e8
	}
	return unix.SchedSetAttr(0, &a, 0)
}

// eventSemaphore needs Linux 6.5, which shows what they are.
func eventSemaphore() error {
	fd, err := unix.Eventfd(5, unix.EFD_SEMAPHORE)
	if err != nil {
		return err
	}
	info, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
	if err == nil && !strings.Contains(string(info), "eventfd-semaphore") {
		err = errors.New("the kernel does not show it")
	}
	return err
}

func socket(path bool) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrUnix{Name: "socket"})
	}
	if err == nil && path {
		_, err = unix.Open("socket", unix.O_PATH, 0)
	}
	return err
}

func watch(unread bool) error {
	fd, err := unix.InotifyInit1(0)
	if err != nil {
		return err
	}
	if _, err := unix.InotifyAddWatch(fd, ".", unix.IN_CREATE); err != nil {
		return err
	}
	if unread {
		return os.WriteFile("new", nil, 0o600)
	}
	return nil
}

func hold(what string) error {
	ready := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread belongs to it
		ready <- holds[what]()
		select {}
	}()
	if err := <-ready; err != nil {
		return err
	}
	fmt.Println("ready")
	_, err := bufio.NewReader(os.Stdin).ReadString('\n')
	return err
}

// What CRIU dumps and then restores as something else is found, and its ordinary
// relative is not.
func TestLost(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root may make namespaces")
	}
	for _, tc := range []struct {
		class      Class
		words      string
		good, lost string
	}{
		{Refused, "a thread with file descriptors of its own", "a thread", "descriptors of a thread"},
		{Refused, "a thread with a working directory of its own", "a thread", "a thread's directory"},
		{Refused, "a thread in namespaces of its own", "a thread", "a thread's UTS namespace"},
		{Refused, "SCHED_DEADLINE", "SCHED_FIFO", "SCHED_DEADLINE"},
		{Refused, "counts like a semaphore", "an eventfd", "an eventfd of semaphores"},
		{Refused, "alarm clock", "a timerfd", "a timerfd of an alarm"},
		{Refused, "waits for pressure by /proc/pressure/cpu", "a pressure file", "a pressure trigger"},
		{Refused, "the file of a socket (with O_PATH)", "a socket", "a socket's path"},
		{Refused, "secret memory", "memory", "secret memory"},
		{Warning, "events of inotify that it has not read", "inotify", "inotify, unread"},
	} {
		t.Run(tc.lost, func(t *testing.T) {
			for _, what := range []string{tc.good, tc.lost} {
				cmd := exec.Command("/proc/self/exe", holdMode, what)
				cmd.Dir = t.TempDir()
				line, err := testproc.Start(t, cmd).ReadString('\n')
				if line != "ready\n" {
					t.Skipf("this machine does not give %s: %s (%v)", what, line, err)
				}
				c, err := Look(t.Context(), cmd.Process.Pid, []int{cmd.Process.Pid}, nil)
				if err != nil {
					t.Fatal(err)
				}
				findings, err := c.Check(nil, &api.CheckpointOptions{})
				if err != nil {
					t.Fatal(err)
				}
				found := false
				for _, f := range findings {
					found = found || f.Class == tc.class && strings.Contains(f.String(), tc.words)
				}
				if found != (what == tc.lost) {
					t.Errorf("with %s: found %v, among %v", what, found, findings)
				}
			}
		})
	}
}
