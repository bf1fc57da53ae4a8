// SPDX-License-Identifier: Apache-2.0

package inspect

import (
	"bufio"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/procfs"
	"github.com/kata-checkpoint/kata-checkpoint/internal/thread"
)

// ipcObject is a System V IPC object.
type ipcObject struct {
	kind string // as users know it
	id   int
	key  uint32
	// pids are those that the kernel remembers: the creator, and who used it last.
	pids []int
}

func (o ipcObject) String() string {
	if o.key == 0 {
		return fmt.Sprintf("the System V %s %d", o.kind, o.id)
	}
	return fmt.Sprintf("the System V %s %d (key %#x)", o.kind, o.id, o.key)
}

// CheckIPC reports whether a container has System V IPC objects of its own, so
// that its IPC namespace has to go into the image set. Others are the processes
// of the sandbox's other containers: Kata gives all of them one IPC namespace.
// Objects that cannot be told apart are refused, and so are POSIX message
// queues, which CRIU 4.2 cannot dump (criu/ipc_ns.c).
func (c *Container) CheckIPC(others []*Process) (own bool, findings []Finding, err error) {
	sharing := slices.DeleteFunc(slices.Clone(others), func(p *Process) bool {
		same, err := procfs.SameNamespace(p.PID, c.Root.PID, "ipc")
		return err != nil || !same
	})
	objects, queues, device, err := ipcObjects(c.Root.PID)
	if err != nil {
		return false, nil, fmt.Errorf("inspect the IPC namespace: %w", err)
	}
	own, findings = c.attribute(objects, sharing)
	return own, append(findings, c.queues(queues, device, sharing)...), nil
}

// attribute decides whose the objects of an IPC namespace are.
func (c *Container) attribute(objects []ipcObject, sharing []*Process) (own bool, findings []Finding) {
	if len(sharing) == 0 {
		return len(objects) > 0, nil
	}
	var mine, foreign []ipcObject
	for _, o := range objects {
		user, other := o.userAmong(c.all()), o.userAmong(sharing)
		switch {
		case user != nil && other != nil:
			findings = append(findings, c.finding(user, rule{Refused, errcode.SharedIPC,
				fmt.Sprintf("uses %s together with the process %s of another container of the pod", o, other.Name),
				"a checkpoint is of one container: run the two in one"}))
		case user != nil:
			mine = append(mine, o)
		case other != nil:
			foreign = append(foreign, o)
		default:
			findings = append(findings, Finding{Class: Refused, Code: errcode.SharedIPC,
				What:   fmt.Sprintf("shares its pod's IPC namespace, in which the processes that used %s have exited, so that its owner is not known", o),
				Advice: "remove it with ipcrm(1), or run the container in a pod of its own"})
		}
	}
	if len(mine) > 0 && len(foreign) > 0 {
		findings = append(findings, Finding{Class: Refused, Code: errcode.SharedIPC,
			What:   fmt.Sprintf("has %s in the pod's IPC namespace, in which another container has %s", mine[0], foreign[0]),
			Advice: "run them in pods of their own"})
	}
	return len(mine) > 0, findings
}

// userAmong returns the first of the processes that is known to use an object.
func (o ipcObject) userAmong(processes []*Process) *Process {
	i := slices.IndexFunc(processes, func(p *Process) bool {
		return slices.Contains(o.pids, p.PID) || o.kind == sharedMemory && slices.ContainsFunc(p.Mappings, func(m Mapping) bool {
			return strings.HasPrefix(m.Path, "/SYSV") && m.Inode == uint64(o.id) //nolint:gosec // not negative
		})
	})
	if i < 0 {
		return nil
	}
	return processes[i]
}

// queues finds POSIX message queues that are the container's, or may be: by the
// names of all in its namespace, and by the device number of their file system.
func (c *Container) queues(queues map[string]uint64, device uint64, sharing []*Process) (findings []Finding) {
	const advice = "have the program communicate in another way, such as by a socket"
	known := make(map[uint64]bool)
	for _, p := range c.all() {
		for _, q := range c.openQueues(p, device) {
			known[q.inode] = true
			findings = append(findings, c.finding(p, rule{Refused, errcode.MessageQueue, "has the POSIX message queue " + q.name + " open, which CRIU cannot checkpoint", advice}))
		}
	}
	if len(queues) > 0 {
		for _, p := range sharing {
			for _, q := range c.openQueues(p, device) {
				known[q.inode] = true
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(queues)) {
		if !known[queues[name]] {
			findings = append(findings, Finding{Class: Refused, Code: errcode.MessageQueue, What: "has the POSIX message queue " + name + ", which CRIU cannot checkpoint", Advice: "remove it, or " + advice})
		}
	}
	return findings
}

type openQueue struct {
	name  string
	inode uint64
}

// openQueues lists the message queues that a process has open, whatever their
// names are: one that was removed has none any more. Their file system is mounted
// by the kernel, where nobody sees it, or also at /dev/mqueue.
func (c *Container) openQueues(p *Process, device uint64) (out []openQueue) {
	for _, f := range p.Files {
		if !strings.HasPrefix(f.Name, "/") || device == 0 {
			continue
		}
		if m := c.mounts.mountOf(f); m != nil && m.FSType != "mqueue" {
			continue
		}
		st, err := lookAt(p, f)
		if err != nil || unix.Mkdev(st.Dev_major, st.Dev_minor) != device || st.Mode&unix.S_IFMT != unix.S_IFREG {
			continue // closed meanwhile, or another file
		}
		out = append(out, openQueue{strings.TrimSuffix(f.Name, deletedSuffix), st.Ino})
	}
	return out
}

// lookAt finds out what a descriptor is of. It asks the kernel only, and never the
// server of a file system.
func lookAt(p *Process, f File) (st unix.Statx_t, err error) {
	err = unix.Statx(unix.AT_FDCWD, fmt.Sprintf("/proc/%d/fd/%d", p.PID, f.FD), unix.AT_STATX_DONT_SYNC, unix.STATX_TYPE|unix.STATX_INO, &st)
	return st, err
}

// The kinds of System V objects.
const (
	sharedMemory = "shared memory segment"
	semaphores   = "semaphore set"
	messages     = "message queue"
)

// ipcObjects lists the System V objects and the message queues in the IPC
// namespace of a process. Device is that of the file system of the queues, or 0.
func ipcObjects(root int) (objects []ipcObject, queues map[string]uint64, device uint64, err error) {
	err = thread.Do(func() error {
		if err := thread.Enter(root, "ipc"); err != nil {
			return err
		}
		// /proc/sysvipc shows the namespace of the thread that opens its files
		// (ipc/util.c, sysvipc_proc_open), with pids of the mount's PID namespace.
		for _, kind := range []struct {
			file, name string
			pids       []string
		}{
			{"shm", sharedMemory, []string{"cpid", "lpid"}},
			{"sem", semaphores, nil},
			{"msg", messages, []string{"lspid", "lrpid"}},
		} {
			list, err := readSysV("/proc/sysvipc/"+kind.file, kind.name, kind.pids)
			if err != nil {
				return err
			}
			objects = append(objects, list...)
		}
		var err error
		queues, device, err = messageQueues()
		return err
	})
	return objects, queues, device, err
}

// readSysV reads one of the files in /proc/sysvipc: a line of column titles and
// a line for each object. A kernel without System V IPC has none of them.
func readSysV(path, kind string, pidColumns []string) ([]ipcObject, error) {
	f, err := os.Open(path)
	if os.IsNotExist(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	if !lines.Scan() {
		return nil, lines.Err()
	}
	titles := strings.Fields(lines.Text())
	var out []ipcObject
	for lines.Scan() {
		o, err := parseSysV(titles, strings.Fields(lines.Text()), kind, pidColumns)
		if err != nil {
			return nil, fmt.Errorf("parse %s: %w", path, err)
		}
		if kind == semaphores {
			o.pids = semaphorePIDs(o.id)
		}
		out = append(out, o)
	}
	return out, lines.Err()
}

func parseSysV(titles, fields []string, kind string, pidColumns []string) (ipcObject, error) {
	if len(titles) < 2 || len(fields) != len(titles) {
		return ipcObject{}, fmt.Errorf("%d fields below %d titles", len(fields), len(titles))
	}
	// The first two are the key, which is printed with a sign, and the id.
	key, err := strconv.ParseInt(fields[0], 10, 32)
	if err != nil {
		return ipcObject{}, err
	}
	id, err := strconv.Atoi(fields[1])
	if err != nil {
		return ipcObject{}, err
	}
	o := ipcObject{kind: kind, id: id, key: uint32(int32(key))} //nolint:gosec // the same 32 bits
	for _, column := range pidColumns {
		i := slices.Index(titles, column)
		if i < 0 {
			return ipcObject{}, fmt.Errorf("no column %s", column)
		}
		pid, err := strconv.Atoi(fields[i])
		if err != nil {
			return ipcObject{}, err
		}
		if pid != 0 { // exited, or of another PID namespace
			o.pids = append(o.pids, pid)
		}
	}
	return o, nil
}

// semaphorePIDs returns the processes that were the last to use the semaphores
// of a set, as far as they are known.
func semaphorePIDs(id int) (pids []int) {
	const getPID = 11 // GETPID of linux/sem.h
	for n := 0; ; n++ {
		pid, _, errno := unix.Syscall6(unix.SYS_SEMCTL, uintptr(id), uintptr(n), getPID, 0, 0, 0)
		if errno != 0 {
			return pids // beyond the last, or removed meanwhile
		}
		if pid != 0 {
			pids = append(pids, int(pid))
		}
	}
}

// messageQueues maps the names of the POSIX message queues in the calling
// thread's IPC namespace to their inodes, by a mount of their file system that
// nobody else sees, and returns its device number.
func messageQueues() (_ map[string]uint64, device uint64, _ error) {
	fs, err := unix.Fsopen("mqueue", unix.FSOPEN_CLOEXEC)
	if err == unix.ENODEV { //nolint:errorlint // an errno
		return nil, 0, nil // a kernel without message queues
	}
	if err != nil {
		return nil, 0, os.NewSyscallError("fsopen", err)
	}
	defer unix.Close(fs)
	if err := unix.FsconfigCreate(fs); err != nil {
		return nil, 0, os.NewSyscallError("fsconfig", err)
	}
	mount, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY)
	if err != nil {
		return nil, 0, os.NewSyscallError("fsmount", err)
	}
	root, err := unix.Openat(mount, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	unix.Close(mount)
	if err != nil {
		return nil, 0, os.NewSyscallError("openat", err)
	}
	dir := os.NewFile(uintptr(root), "mqueue")
	defer dir.Close()
	var own unix.Stat_t
	if err := unix.Fstat(root, &own); err != nil {
		return nil, 0, os.NewSyscallError("fstat", err)
	}
	device = own.Dev
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, 0, err
	}
	queues := make(map[string]uint64, len(names))
	for _, name := range names {
		var st unix.Stat_t
		if err := unix.Fstatat(root, name, &st, unix.AT_SYMLINK_NOFOLLOW); err == nil {
			queues["/"+name] = st.Ino
		}
	}
	return queues, device, nil
}
