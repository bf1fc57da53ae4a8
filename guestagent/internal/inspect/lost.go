// SPDX-License-Identifier: Apache-2.0

package inspect

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/pidfd"
)

// Lost finds what CRIU 4.2 dumps without a word and restores as something else, or
// not at all: the program would notice it some time after the restore.
func (c *Container) lost() (out []Finding) {
	for _, p := range c.Processes {
		for _, r := range c.apart(p) {
			out = append(out, c.finding(p, r))
		}
		for _, f := range p.Files {
			if r := c.lostFile(p, f); r.class != Good {
				out = append(out, c.finding(p, r))
			}
		}
		for _, m := range p.Mappings {
			if strings.HasPrefix(m.Path, secretMemory) {
				out = append(out, c.finding(p, secret))
			}
		}
	}
	return out
}

// Rules for threads.
var (
	threadFiles = rule{Refused, errcode.ThreadApart, "has a thread with file descriptors of its own (unshare), which CRIU restores as the main thread's", "terminate it before the checkpoint"}
	threadDirs  = rule{Refused, errcode.ThreadApart, "has a thread with a working directory of its own (unshare), which CRIU restores as the main thread's", "terminate it before the checkpoint"}
	threadSpace = rule{Refused, errcode.ThreadApart, "has a thread in namespaces of its own (unshare or setns), which CRIU restores in the main thread's", "terminate it before the checkpoint"}
	deadline    = rule{Refused, errcode.DeadlinePolicy, "has the scheduling policy SCHED_DEADLINE, which CRIU cannot restore", "have it use another policy, such as SCHED_FIFO"}
)

// Of linux/kcmp.h.
const (
	kcmpVM    = 1 // KCMP_VM
	kcmpFiles = 2 // KCMP_FILES
	kcmpFS    = 3 // KCMP_FS
)

// schedDeadline is SCHED_DEADLINE of linux/sched.h.
const schedDeadline = 6

// apart finds out whether the threads of a process share what CRIU dumps of the
// main one only.
func (c *Container) apart(p *Process) (out []rule) {
	tasks := "/proc/" + strconv.Itoa(p.PID) + "/task"
	var st unix.Stat_t
	if err := unix.Stat(tasks, &st); err != nil {
		return nil // it has exited
	}
	threads := []string{strconv.Itoa(p.PID)}
	const links = 2 // of a directory without any others
	if st.Nlink > links+1 {
		entries, err := os.ReadDir(tasks)
		if err != nil {
			return nil
		}
		for _, e := range entries {
			if e.Name() != threads[0] {
				threads = append(threads, e.Name())
			}
		}
	}
	for _, name := range threads {
		tid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		if a, err := unix.SchedGetAttr(tid, 0); err == nil && a.Policy == schedDeadline {
			out = append(out, deadline)
		}
		if tid == p.PID {
			continue
		}
		if differ(p.PID, tid, kcmpFiles) {
			out = append(out, threadFiles)
		}
		if differ(p.PID, tid, kcmpFS) {
			out = append(out, threadDirs)
		}
		for _, kind := range []string{"net", "uts", "ipc", "mnt"} {
			own := p.Namespaces[kind]
			if kind == "mnt" {
				own = p.mountNamespace
			}
			if link, err := os.Readlink(filepath.Join(tasks, name, "ns", kind)); err == nil && own != "" && link != own {
				out = append(out, threadSpace)
			}
		}
	}
	return out
}

// differ reports whether two threads are known to have another one of what kind
// is, see kcmp(2).
func differ(a, b, kind int) bool {
	order, _, errno := unix.Syscall6(unix.SYS_KCMP, uintptr(a), uintptr(b), uintptr(kind), 0, 0, 0)
	return errno == 0 && order != 0
}

// Rules for descriptors.
var (
	pressure  = rule{Refused, errcode.PressureTrigger, "", "close it before the checkpoint, or run the program without it"}
	semaphore = rule{Refused, errcode.EventSemaphore, "has an eventfd that counts like a semaphore (EFD_SEMAPHORE) open, which CRIU restores as one that does not", "close it before the checkpoint"}
	alarm     = rule{Refused, errcode.AlarmTimer, "has a timerfd of an alarm clock (CLOCK_REALTIME_ALARM, CLOCK_BOOTTIME_ALARM) open, which CRIU cannot checkpoint", "close it before the checkpoint"}
	unread    = rule{class: Warning, what: "has events of inotify that it has not read", advice: "it does not get them after a restore"}
)

// Rules for what CRIU refuses late.
var (
	secret     = unsupported("secret memory (memfd_secret)")
	socketPath = unsupported("the file of a socket (with O_PATH)")
)

// secretMemory begins the name of memory of memfd_secret(2).
const secretMemory = "/secretmem"

// lostFile finds the rule for a descriptor whose kind CRIU can dump, but not what
// the process has made of it.
func (c *Container) lostFile(p *Process, f File) rule {
	switch kind, _ := strings.CutPrefix(f.Name, anonInode); kind {
	case "[eventfd]":
		// From Linux 6.5 on.
		if fdinfo(p, f, "eventfd-semaphore") == "1" {
			return semaphore
		}
		return rule{}
	case "[timerfd]":
		switch fdinfo(p, f, "clockid") {
		case strconv.Itoa(unix.CLOCK_REALTIME_ALARM), strconv.Itoa(unix.CLOCK_BOOTTIME_ALARM):
			return alarm
		}
		return rule{}
	case "inotify":
		if waiting(p, f) > 0 {
			return unread
		}
		return rule{}
	}
	switch {
	case strings.HasPrefix(f.Name, secretMemory):
		return secret
	case f.Flags&unix.O_PATH != 0 && strings.HasPrefix(f.Name, "/"):
		// CRIU takes it for a socket (criu/files.c, dump_one_file).
		if st, err := lookAt(p, f); err == nil && st.Mode&unix.S_IFMT == unix.S_IFSOCK {
			return socketPath
		}
		return rule{}
	case !f.writable():
		return rule{}
	}
	inProc := strings.HasPrefix(f.Name, "/proc/pressure/")
	if !inProc && !strings.HasSuffix(f.Name, ".pressure") {
		return rule{}
	}
	if m := c.mounts.mountOf(f); !inProc && (m == nil || m.FSType != "cgroup2") {
		return rule{}
	}
	r := pressure
	r.what = "waits for pressure by " + f.Name + " (PSI), and CRIU does not restore for how much"
	return r
}

// fdinfo returns a field of what /proc shows of a descriptor.
func fdinfo(p *Process, f File, field string) string {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/%d", p.PID, f.FD))
	if err != nil {
		return "" // closed meanwhile
	}
	for line := range bytes.Lines(data) {
		if name, value, _ := bytes.Cut(line, []byte(":")); string(name) == field {
			return string(bytes.TrimSpace(value))
		}
	}
	return ""
}

// waiting is how many bytes can be read from a descriptor.
func waiting(p *Process, f File) int {
	process, err := pidfd.Open(p.PID)
	if err != nil {
		return 0 // it has exited
	}
	defer unix.Close(process)
	fd, err := unix.PidfdGetfd(process, f.FD, 0)
	if err != nil {
		return 0
	}
	defer unix.Close(fd)
	n, err := unix.IoctlGetInt(fd, unix.TIOCINQ)
	if err != nil && !errors.Is(err, unix.EINTR) {
		return 0
	}
	return n
}

// Forking finds processes that share their parent's memory, which CRIU cannot
// dump: those that vfork(2) has made and that have executed no program yet, while
// the parent waits in the kernel. All are frozen.
func (c *Container) Forking() (out []Finding) {
	for _, p := range c.Processes {
		if p != c.Root && SharesMemory(p.PID, p.Parent) {
			out = append(out, c.finding(p, rule{Refused, errcode.ForkPending, "shares the memory of its parent (vfork) and has executed no program yet, which CRIU cannot checkpoint", "repeat the checkpoint"}))
		}
	}
	return out
}

// SharesMemory reports whether two processes are known to have one memory.
func SharesMemory(a, b int) bool {
	order, _, errno := unix.Syscall6(unix.SYS_KCMP, uintptr(a), uintptr(b), kcmpVM, 0, 0, 0)
	return errno == 0 && order == 0
}
