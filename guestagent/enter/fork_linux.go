package enter

import (
	"os"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Go's runtime lets a process fork by these (package syscall does); they block
// signals around the fork and make sure that nothing grows a stack in between.

//go:linkname beforeFork syscall.runtime_BeforeFork
func beforeFork()

//go:linkname afterFork syscall.runtime_AfterFork
func afterFork()

//go:linkname afterForkInChild syscall.runtime_AfterForkInChild
func afterForkInChild()

// A record of the report: a kind and a value, 32 bits each.
const (
	recordSize = 8
	recordPID  = 1
)

// Steps of the children that can fail, by the record kinds that report them.
const (
	stepCgroup = iota + 2
	stepOOM
	stepHide
	stepNamespaces
	stepFork
	stepSession
	stepStdio
	stepTerminal
	stepLimits
	stepCwd
	stepGroups
	stepGID
	stepUID
	stepCapabilities
	stepNoNew
	stepExec
)

var stepNames = map[uint32]string{
	stepCgroup: "enter the container's cgroup", stepOOM: "set the OOM score", stepHide: "hide from the container", stepNamespaces: "enter the container's namespaces",
	stepFork: "fork in the container", stepSession: "make a session", stepStdio: "place stdio", stepTerminal: "take the terminal",
	stepLimits: "set resource limits", stepCwd: "change to the working directory", stepGroups: "set groups", stepGID: "set the group",
	stepUID: "set the user", stepCapabilities: "set capabilities", stepNoNew: "set no-new-privileges", stepExec: "exec",
}

// namespaces that the child joins by one setns on a pidfd. The user namespace
// is not among them: Kata gives containers none of their own. The network is
// the guest's.
const namespaces = unix.CLONE_NEWNS | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWPID | unix.CLONE_NEWCGROUP | unix.CLONE_NEWTIME

// fork starts the first child and waits for it to end: it only forks the
// second one, into the namespaces and as a child of the caller.
func (p *plan) fork() (*os.File, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	syscall.ForkLock.Lock()
	pid, errno := p.children()
	syscall.ForkLock.Unlock()
	runtime.KeepAlive(p)
	if errno != 0 {
		p.read.Close()
		return nil, errno
	}
	p.close() // the report ends when the children have closed theirs
	for {
		_, err := unix.Wait4(pid, nil, 0, nil)
		if err != unix.EINTR {
			break
		}
	}
	return p.read, nil
}

// children is both children's code. After the first fork nothing may be
// called that can grow the stack: system calls only, in one function.
//
//go:norace
//go:noinline
func (p *plan) children() (int, syscall.Errno) {
	var (
		record [2]uint32
		zero   = [1]byte{'0'}
		step   uint32
		r1     uintptr
		errno  syscall.Errno
		i      int
	)
	stdio, limits, drops, ambient, paths := p.stdio, p.limits, p.dropCaps, p.ambient, p.paths

	beforeFork()
	r1, _, errno = unix.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
	if errno != 0 || r1 != 0 {
		afterFork()
		return int(r1), errno
	}
	afterForkInChild()

	step = stepCgroup
	if _, _, errno = unix.RawSyscall(unix.SYS_WRITE, p.cgroup, uintptr(unsafe.Pointer(&zero[0])), 1); errno != 0 {
		goto fail
	}
	step = stepOOM
	if r1, _, errno = unix.RawSyscall6(unix.SYS_OPENAT, ^uintptr(99), uintptr(unsafe.Pointer(p.oomPath)), unix.O_WRONLY|unix.O_CLOEXEC, 0, 0, 0); errno != 0 {
		goto fail
	}
	if _, _, errno = unix.RawSyscall(unix.SYS_WRITE, r1, uintptr(unsafe.Pointer(&p.oomValue[0])), uintptr(len(p.oomValue))); errno != 0 {
		goto fail
	}
	// Until they become the command the children have the agent's memory and
	// descriptors. None of the container's processes, which see the second one,
	// may look into it or trace it, not even with the same capabilities; execve
	// ends this.
	step = stepHide
	if _, _, errno = unix.RawSyscall(unix.SYS_PRCTL, unix.PR_SET_DUMPABLE, 0, 0); errno != 0 {
		goto fail
	}
	step = stepNamespaces
	if _, _, errno = unix.RawSyscall(unix.SYS_SETNS, p.pidfd, namespaces, 0); errno != 0 {
		goto fail
	}
	step = stepFork
	r1, _, errno = unix.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD)|unix.CLONE_PARENT, 0, 0, 0, 0, 0)
	if errno != 0 {
		goto fail
	}
	if r1 != 0 {
		record[0], record[1] = recordPID, uint32(r1) //nolint:gosec // a pid
		unix.RawSyscall(unix.SYS_WRITE, p.report, uintptr(unsafe.Pointer(&record[0])), recordSize)
		unix.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
	}

	step = stepSession
	if _, _, errno = unix.RawSyscall(unix.SYS_SETSID, 0, 0, 0); errno != 0 {
		goto fail
	}
	step = stepStdio
	for i = 0; i < 3; i++ {
		if _, _, errno = unix.RawSyscall(unix.SYS_DUP3, stdio[i], uintptr(i), 0); errno != 0 {
			goto fail
		}
	}
	if _, _, errno = unix.RawSyscall(unix.SYS_CLOSE_RANGE, 3, 0x7fffffff, unix.CLOSE_RANGE_CLOEXEC); errno != 0 {
		goto fail
	}
	if p.terminal {
		step = stepTerminal
		// 1: the helper's session gives it up.
		if _, _, errno = unix.RawSyscall(unix.SYS_IOCTL, 0, unix.TIOCSCTTY, 1); errno != 0 {
			goto fail
		}
	}
	step = stepLimits
	for i = 0; i < len(limits); i++ {
		if _, _, errno = unix.RawSyscall6(unix.SYS_PRLIMIT64, 0, limits[i].resource, uintptr(unsafe.Pointer(&limits[i].value)), 0, 0, 0); errno != 0 {
			goto fail
		}
	}
	step = stepCwd
	if _, _, errno = unix.RawSyscall(unix.SYS_CHDIR, uintptr(unsafe.Pointer(p.cwd)), 0, 0); errno != 0 {
		goto fail
	}
	unix.RawSyscall(unix.SYS_UMASK, p.umask, 0, 0)
	step = stepGroups
	if len(p.groups) > 0 {
		_, _, errno = unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(p.groups)), uintptr(unsafe.Pointer(&p.groups[0])), 0)
	} else {
		_, _, errno = unix.RawSyscall(unix.SYS_SETGROUPS, 0, 0, 0)
	}
	if errno != 0 {
		goto fail
	}
	step = stepGID
	if _, _, errno = unix.RawSyscall(unix.SYS_SETRESGID, p.gid, p.gid, p.gid); errno != 0 {
		goto fail
	}
	step = stepCapabilities
	for i = 0; i < len(drops); i++ {
		if _, _, errno = unix.RawSyscall(unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, drops[i], 0); errno != 0 {
			goto fail
		}
	}
	if _, _, errno = unix.RawSyscall(unix.SYS_PRCTL, unix.PR_SET_KEEPCAPS, 1, 0); errno != 0 {
		goto fail
	}
	step = stepUID
	if _, _, errno = unix.RawSyscall(unix.SYS_SETRESUID, p.uid, p.uid, p.uid); errno != 0 {
		goto fail
	}
	step = stepCapabilities
	if _, _, errno = unix.RawSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&p.header)), uintptr(unsafe.Pointer(&p.caps[0])), 0); errno != 0 {
		goto fail
	}
	for i = 0; i < len(ambient); i++ {
		if _, _, errno = unix.RawSyscall6(unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, ambient[i], 0, 0, 0); errno != 0 {
			goto fail
		}
	}
	if p.noNew {
		step = stepNoNew
		if _, _, errno = unix.RawSyscall6(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0); errno != 0 {
			goto fail
		}
	}
	step = stepExec
	record[1] = uint32(unix.ENOENT)
	for i = 0; i < len(paths); i++ {
		_, _, errno = unix.RawSyscall(unix.SYS_EXECVE, uintptr(unsafe.Pointer(paths[i])), uintptr(unsafe.Pointer(&p.argv[0])), uintptr(unsafe.Pointer(&p.envv[0])))
		// As execvp: a missing one is passed over, any other error counts.
		if errno != unix.ENOENT && errno != unix.ENOTDIR {
			record[1] = uint32(errno) //nolint:gosec // an errno
		}
	}
	errno = syscall.Errno(record[1])

fail:
	record[0], record[1] = step, uint32(errno) //nolint:gosec // an errno
	unix.RawSyscall(unix.SYS_WRITE, p.report, uintptr(unsafe.Pointer(&record[0])), recordSize)
	for {
		unix.RawSyscall(unix.SYS_EXIT_GROUP, 127, 0, 0)
	}
}
