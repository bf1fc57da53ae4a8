package enter

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A record of the report: a kind and a value, 32 bits each.
const (
	recordSize  = 8
	recordPID   = 1 // the pid of the process
	recordFirst = 2 // the pid of the first child, to be waited for
)

// Steps of the children that can fail, by the record kinds that report them.
const (
	stepOOM = iota + 3
	stepHide
	stepNamespaces
	stepReceive
	stepFork
	stepCgroup
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
	stepRead
)

var stepNames = map[uint32]string{
	stepOOM: "set the OOM score", stepHide: "hide from the container", stepNamespaces: "enter the container's namespaces", stepReceive: "receive stdio",
	stepFork: "fork in the container", stepCgroup: "enter the container's cgroup namespace", stepSession: "make a session", stepStdio: "place stdio", stepTerminal: "take the terminal",
	stepLimits: "set resource limits", stepCwd: "change to the working directory", stepGroups: "set groups", stepGID: "set the group",
	stepUID: "set the user", stepCapabilities: "set capabilities", stepNoNew: "set no-new-privileges", stepExec: "exec", stepRead: "read the request",
}

// namespaces that the first child joins by one setns on a pidfd. The user
// namespace is not among them: Kata gives containers none of their own. The
// network is the guest's. The cgroup namespace has to wait until the process is
// in its cgroup: from inside of it, that is the only way in which is open.
const namespaces = unix.CLONE_NEWNS | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWPID | unix.CLONE_NEWTIME

// order is what the spawner was handed: descriptors, and where the plan is.
type order struct {
	base   uintptr
	stdio  uintptr
	report uintptr
	pidfd  uintptr
	cgroup uintptr
}

// cloneArgs is struct clone_args (clone3(2)).
type cloneArgs struct {
	flags, pidfd, childTID, parentTID, exitSignal, stack, stackSize, tls, setTID, setTIDSize, cgroup uint64
}

// fork starts the first child, which joins the namespaces, waits for the stdio
// and forks the second one, which they hold for. Both are children of this
// process's parent. The children's code is this function, too: it may call
// nothing but the kernel.
//
// Until there is a stdio the container has nothing of the process: the first
// child is in none of its cgroups, and outside of its pid namespace.
//
// Only a process that is in a pid namespace itself can make one below it. So
// where the process is to be the first of one, the second child forks a third.
// Those two are the guest's reaper's, and not that of the target's pid
// namespace, which would take the third for one of the container's.
//
//go:norace
//go:noinline
func (p *plan) fork(o *order) (uintptr, syscall.Errno) {
	var (
		record [2]uint32
		stdio  stdioRights
		fork   cloneArgs
		step   uint32
		r1     uintptr
		errno  syscall.Errno
		i      int
	)
	r1, _, errno = unix.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD)|unix.CLONE_PARENT, 0, 0, 0, 0, 0)
	if errno != 0 || r1 != 0 {
		return r1, errno
	}

	step = stepOOM
	if r1, _, errno = unix.RawSyscall6(unix.SYS_OPENAT, ^uintptr(99), o.base+p.oomPath, unix.O_WRONLY|unix.O_CLOEXEC, 0, 0, 0); errno != 0 {
		goto fail
	}
	if _, _, errno = unix.RawSyscall(unix.SYS_WRITE, r1, o.base+p.oomValue, p.oomSize); errno != 0 {
		goto fail
	}
	// Until they become the command the children have the spawner's memory and
	// descriptors. None of the container's processes, which see the second one,
	// may look into it or trace it, not even with the same capabilities; execve
	// ends this.
	step = stepHide
	if _, _, errno = unix.RawSyscall(unix.SYS_PRCTL, unix.PR_SET_DUMPABLE, 0, 0); errno != 0 {
		goto fail
	}
	step = stepNamespaces
	if _, _, errno = unix.RawSyscall(unix.SYS_SETNS, o.pidfd, namespaces, 0); errno != 0 {
		goto fail
	}
	step = stepReceive
	if r1, errno = receive(o.stdio, unsafe.Pointer(&stdio), unsafe.Sizeof(stdio)); errno != 0 {
		goto fail
	}
	if r1 == 0 { // nobody will send any
		unix.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
	}
	if !stdio.header.holds(unsafe.Sizeof(stdio.files)) {
		errno = unix.EBADMSG
		goto fail
	}
	// Moving a process that is there into a cgroup waits for all processors to
	// have passed through the scheduler, which takes longer than all the rest.
	step = stepFork
	fork = cloneArgs{flags: unix.CLONE_PARENT | unix.CLONE_INTO_CGROUP, cgroup: uint64(o.cgroup)}
	if p.first {
		fork.flags, fork.exitSignal = unix.CLONE_INTO_CGROUP, uint64(unix.SIGCHLD)
	}
	r1, _, errno = unix.RawSyscall(unix.SYS_CLONE3, uintptr(unsafe.Pointer(&fork)), unsafe.Sizeof(fork), 0)
	if errno != 0 {
		goto fail
	}
	if p.first {
		if r1 != 0 {
			unix.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
		}
		// The second child waits until the third is the command or has failed: so
		// a failure is reported before a pid that nobody can wait for.
		fork = cloneArgs{flags: unix.CLONE_PARENT | unix.CLONE_NEWPID | unix.CLONE_VFORK}
		r1, _, errno = unix.RawSyscall(unix.SYS_CLONE3, uintptr(unsafe.Pointer(&fork)), unsafe.Sizeof(fork), 0)
	}
	if errno != 0 {
		goto fail
	}
	if r1 != 0 {
		record[0], record[1] = recordPID, uint32(r1) //nolint:gosec // a pid
		unix.RawSyscall(unix.SYS_WRITE, o.report, uintptr(unsafe.Pointer(&record[0])), recordSize)
		unix.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
	}

	step = stepCgroup
	if _, _, errno = unix.RawSyscall(unix.SYS_SETNS, o.pidfd, unix.CLONE_NEWCGROUP, 0); errno != 0 {
		goto fail
	}
	step = stepSession
	if _, _, errno = unix.RawSyscall(unix.SYS_SETSID, 0, 0, 0); errno != 0 {
		goto fail
	}
	step = stepStdio
	for i = 0; i < 3; i++ {
		if _, _, errno = unix.RawSyscall(unix.SYS_DUP3, uintptr(stdio.files[i]), uintptr(i), 0); errno != 0 { //nolint:gosec // a descriptor
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
	for i = 0; i < p.limitCount; i++ {
		if _, _, errno = unix.RawSyscall6(unix.SYS_PRLIMIT64, 0, p.limits[i].resource, uintptr(unsafe.Pointer(&p.limits[i].value)), 0, 0, 0); errno != 0 {
			goto fail
		}
	}
	step = stepCwd
	if _, _, errno = unix.RawSyscall(unix.SYS_CHDIR, o.base+p.cwd, 0, 0); errno != 0 {
		goto fail
	}
	unix.RawSyscall(unix.SYS_UMASK, p.umask, 0, 0)
	step = stepGroups
	if _, _, errno = unix.RawSyscall(unix.SYS_SETGROUPS, p.groupCount, o.base+p.groups, 0); errno != 0 {
		goto fail
	}
	step = stepGID
	if _, _, errno = unix.RawSyscall(unix.SYS_SETRESGID, p.gid, p.gid, p.gid); errno != 0 {
		goto fail
	}
	step = stepCapabilities
	for i = 0; i < 64; i++ {
		if p.drop&(1<<uint(i)) == 0 {
			continue
		}
		if _, _, errno = unix.RawSyscall(unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, uintptr(i), 0); errno != 0 {
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
	for i = 0; i < 64; i++ {
		if p.ambient&(1<<uint(i)) == 0 {
			continue
		}
		if _, _, errno = unix.RawSyscall6(unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, uintptr(i), 0, 0, 0); errno != 0 {
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
	for i = 0; i < p.pathCount; i++ {
		_, _, errno = unix.RawSyscall(unix.SYS_EXECVE, o.base+p.paths[i], o.base+p.argv, o.base+p.envv)
		// As execvp: a missing one is passed over, any other error counts.
		if errno != unix.ENOENT && errno != unix.ENOTDIR {
			record[1] = uint32(errno) //nolint:gosec // an errno
		}
	}
	errno = syscall.Errno(record[1])

fail:
	record[0], record[1] = step, uint32(errno)
	unix.RawSyscall(unix.SYS_WRITE, o.report, uintptr(unsafe.Pointer(&record[0])), recordSize)
	for {
		unix.RawSyscall(unix.SYS_EXIT_GROUP, 127, 0, 0)
	}
}
