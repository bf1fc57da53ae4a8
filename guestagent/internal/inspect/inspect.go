// SPDX-License-Identifier: Apache-2.0

// Package inspect looks at a container's processes without changing them: what
// they have open and mapped, their sockets, mounts and namespaces, and what of
// it CRIU cannot checkpoint. The agent calls it before it freezes a container,
// and again once the processes are frozen. While they run, what was read may be
// outdated by the time it is returned, and a process that exits meanwhile is
// left out.
//
// [Look] reads each process once. What it read is judged by [Container.Check],
// and [Container.OpenFiles] and [Container.WrittenFiles] list files from it.
//
// It relies on /proc and sock_diag as in Linux 6.18, on what CRIU 4.2 can dump,
// and on how the kata-agent of Kata 4.1.0 sets up stdio and mounts.
package inspect

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kata-checkpoint/kata-checkpoint/internal/errclass"
	"github.com/kata-checkpoint/kata-checkpoint/internal/errcode"
	"github.com/kata-checkpoint/kata-checkpoint/internal/procfs"
)

// Container is what one look at a container's processes has read.
type Container struct {
	// Root is init, or the root of a restored tree.
	Root *Process
	// Processes are those that a checkpoint is of: Root and what descends from it.
	Processes []*Process
	// Execs are those that execs have started, and their children. CRIU, which
	// follows the tree from its root, leaves them out; one whose parent exits
	// becomes a child of init's, and no longer is one of these.
	Execs []*Process
	// Connections are their open TCP connections.
	Connections []Connection
	// Names are those that [Container.CheckNames] has found.
	Names Names

	// Addresses are the guest's, in whose network namespace they are.
	Addresses []Address

	// made are the names of the network interfaces that somebody in the guest has
	// made, by their indices.
	made    map[int]string
	sockets sockets
	mounts  *mountTable
	// points are the mount points that it was created with, nil if they are not
	// known.
	points []Point
}

// Process is what one pass over /proc/PID has read.
type Process struct {
	// PID is the one in the guest's root PID namespace.
	PID int
	// PIDs are those in each PID namespace, from the guest's root one inwards.
	PIDs []int
	// Name is the command's name.
	Name string
	// Parent is the parent's PID, or 0 where the parent is not visible here.
	Parent int
	// Exec: it is one of [Container.Execs].
	Exec bool
	// Terminal is the device number of the controlling terminal, or 0, and
	// Session the PID of the session's leader, or 0 where that is not visible here.
	Terminal uint64
	Session  int
	// Tracer is the PID of the process that traces it or one of its threads, or 0.
	Tracer int
	// Trapped: a SIGTRAP is pending for it or for one of its threads.
	Trapped bool
	// Headless: the main thread has exited, and others run.
	Headless bool
	// Namespaces are those of the kinds in [nested], as their links in /proc
	// show them.
	Namespaces map[string]string
	// mountNamespace, rootDir and workDir are as its links in /proc show them.
	mountNamespace, rootDir, workDir string
	// Files are the open descriptors.
	Files []File
	// Mappings are those of files. Neighbours of one file that only differ in
	// their addresses are one.
	Mappings []Mapping
}

// File is an open descriptor.
type File struct {
	FD int
	// Name is what its link in /proc shows: a path, or a kind and a number.
	Name string
	// Flags are those of open, MountID is the mount that the file is on, and Inode
	// its number there. They are read for paths, pipes and pidfds only.
	Flags, MountID int
	Inode          uint64
	// Target is the PID of the process that a pidfd is of, -1 where that has been
	// reaped, 0 where it is not visible here or the descriptor is another one.
	Target int
}

// writable reports whether the descriptor was opened for writing.
func (f File) writable() bool {
	mode := f.Flags & unix.O_ACCMODE
	return mode == unix.O_WRONLY || mode == unix.O_RDWR
}

// appends reports whether the descriptor can only be appended to.
func (f File) appends() bool {
	return f.Flags&unix.O_ACCMODE == unix.O_WRONLY && f.Flags&unix.O_APPEND != 0
}

// Mapping is a part of a process's memory that a file is mapped to.
type Mapping struct {
	// Addresses are its name in /proc/PID/map_files.
	Addresses string
	Shared    bool
	// Device is MAJOR:MINOR in hexadecimal, as /proc/PID/maps has it.
	Device, Path string
	// Inode is the file's number on its device. That of a System V shared memory
	// segment is its id (ipc/shm.c, newseg).
	Inode uint64
}

// Look reads the processes of a container, of which root is the first. Points
// are the mount points that it was created with, nil if they are not known.
func Look(ctx context.Context, root int, pids []int, points []Point) (*Container, error) {
	c, err := LookAtFiles(ctx, root, pids, points)
	if err != nil {
		return nil, err
	}
	if c.sockets, err = readSockets(c.all()); err != nil {
		return nil, err
	}
	c.Connections = c.sockets.connections
	if c.Addresses, c.made, err = interfaces(); err != nil {
		return nil, err
	}
	return c, nil
}

// LookAtFiles is Look without sockets and addresses.
func LookAtFiles(ctx context.Context, root int, pids []int, points []Point) (*Container, error) {
	all, err := Processes(ctx, pids)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(all, func(p *Process) bool { return p.PID == root })
	if i < 0 {
		return nil, errclass.Precondition(errcode.ProcessExited, "the container's process has exited")
	}
	c := &Container{Root: all[i], points: points}
	c.tellApart(all)
	if c.mounts, err = readMounts(c.Root, all, points); err != nil {
		return nil, err
	}
	return c, nil
}

// tellApart finds the processes that execs have started among all of a
// container's. One that has lost its parent to the init of a PID namespace that
// is not the container's own is not one of these.
func (c *Container) tellApart(all []*Process) {
	byPID := make(map[int]*Process, len(all))
	for _, p := range all {
		byPID[p.PID] = p
	}
	for _, p := range all {
		top := p
		for top != c.Root && byPID[top.Parent] != nil {
			top = byPID[top.Parent]
		}
		if p.Exec = top != c.Root && !c.orphaned(top); p.Exec {
			c.Execs = append(c.Execs, p)
		} else {
			c.Processes = append(c.Processes, p)
		}
	}
}

// all are the processes that share the container's cgroup.
func (c *Container) all() []*Process { return slices.Concat(c.Processes, c.Execs) }

// Processes reads processes, without those that have exited.
func Processes(ctx context.Context, pids []int) ([]*Process, error) {
	out := make([]*Process, 0, len(pids))
	r := reader{mapped: make(map[string]Mapping), pipes: make(map[File]File)}
	for _, pid := range pids {
		if err := ended(ctx); err != nil {
			return nil, err
		}
		p, err := r.process(pid)
		if gone(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("inspect process %d: %w", pid, err)
		}
		out = append(out, p)
	}
	return out, nil
}

// ended is the error of a context that has ended.
func ended(ctx context.Context) error {
	if ctx.Err() == nil {
		return nil
	}
	return fmt.Errorf("inspect the container: %w", context.Cause(ctx))
}

// gone reports whether an error means that a process has exited, or has closed
// a descriptor.
func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH)
}

// reader reads processes one after the other. They have much in common.
type reader struct {
	dir *procfs.Dir
	// mapped has what lines of maps say of a file.
	mapped map[string]Mapping
	// pipes have been read: processes have most of theirs from their parents, by
	// the same number.
	pipes map[File]File
}

// maxMapped bounds the files and pipes that a reader remembers.
const maxMapped = 10000

func (r *reader) process(pid int) (*Process, error) {
	dir, err := procfs.OpenDir(pid, r.dir)
	if err != nil {
		return nil, err
	}
	r.dir = dir
	defer dir.Close()
	stat, err := dir.Stat()
	if err != nil {
		return nil, err
	}
	p := &Process{PID: pid, Name: shown(stat.Name), Parent: stat.Parent, Terminal: stat.Terminal, Session: stat.Session}
	if err := p.readStatus(dir); err != nil {
		return nil, err
	}
	if stat.Exited() {
		threads, err := dir.Names("task")
		if err != nil {
			return nil, err
		}
		p.Headless = len(threads) > 1
	}
	// A zombie has no namespaces, and nothing open or mapped.
	if p.Namespaces, err = readNamespaces(dir); err != nil {
		return nil, err
	}
	p.mountNamespace, _ = dir.Link("ns/mnt")
	p.rootDir, _ = dir.Link("root")
	p.workDir, _ = dir.Link("cwd")
	if p.Files, err = r.files(); err != nil {
		return nil, err
	}
	if p.Mappings, err = r.mappings(); err != nil && !gone(err) {
		return nil, err
	}
	return p, nil
}

// sigTrap is the signal's bit in a set of signals.
const sigTrap = 1 << (unix.SIGTRAP - 1)

// readStatus reads what the kernel says of the process and its threads, of which
// each has signals and a tracer of its own.
func (p *Process) readStatus(dir *procfs.Dir) error {
	s, err := dir.TaskStatus("status")
	if err != nil {
		return err
	}
	p.PIDs, p.Tracer, p.Trapped = s.PIDs, s.Tracer, s.Pending&sigTrap != 0
	if s.Threads <= 1 {
		return nil
	}
	threads, err := dir.Names("task")
	if err != nil {
		return err
	}
	for _, thread := range threads {
		if thread == strconv.Itoa(p.PID) {
			continue // the main thread, see above
		}
		s, err := dir.TaskStatus("task/" + thread + "/status")
		if gone(err) {
			continue
		}
		if err != nil {
			return err
		}
		p.Tracer = max(p.Tracer, s.Tracer)
		p.Trapped = p.Trapped || s.Pending&sigTrap != 0
	}
	return nil
}

// links calls f with the number and the name of each descriptor of a process.
// One that has exited has none.
func links(dir *procfs.Dir, f func(fd int, name string) error) error {
	numbers, err := dir.Names("fd")
	if gone(err) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, number := range numbers {
		name, err := dir.Link("fd/" + number)
		if err != nil {
			continue // closed meanwhile
		}
		fd, err := strconv.Atoi(number)
		if err != nil {
			return err
		}
		if err := f(fd, name); err != nil {
			return err
		}
	}
	return nil
}

// pidFD is what the link of a pidfd in /proc shows.
const pidFD = anonInode + "[pidfd]"

func (r *reader) files() ([]File, error) {
	var out []File
	err := links(r.dir, func(fd int, name string) error {
		f := File{FD: fd, Name: name}
		pipe := strings.HasPrefix(name, "pipe:")
		if pipe {
			if known, ok := r.pipes[f]; ok {
				out = append(out, known)
				return nil
			}
		}
		if pipe || strings.HasPrefix(name, "/") || name == pidFD {
			info, err := r.dir.ReadRecord("fdinfo/" + strconv.Itoa(fd))
			if gone(err) {
				return nil
			}
			if err != nil {
				return err
			}
			if err := f.parseInfo(info); err != nil {
				return err
			}
		}
		if pipe && len(r.pipes) < maxMapped {
			r.pipes[File{FD: fd, Name: name}] = f
		}
		out = append(out, f)
		return nil
	})
	return out, err
}

// parseInfo takes what is needed from a descriptor's fdinfo, see
// proc_pid_fdinfo(5).
func (f *File) parseInfo(info []byte) error {
	for line := range bytes.Lines(info) {
		name, value, _ := bytes.Cut(line, []byte(":"))
		value = bytes.TrimSpace(value)
		var n int64
		var err error
		switch string(name) {
		case "flags":
			n, err = strconv.ParseInt(string(value), 8, 64)
			f.Flags = int(n)
		case "mnt_id":
			f.MountID, err = strconv.Atoi(string(value))
		case "ino":
			f.Inode, err = strconv.ParseUint(string(value), 10, 64)
		case "Pid":
			f.Target, err = strconv.Atoi(string(value))
		}
		if err != nil {
			return fmt.Errorf("fdinfo of descriptor %d: %w", f.FD, err)
		}
	}
	return nil
}

func (r *reader) mappings() ([]Mapping, error) {
	maps, err := r.dir.Read("maps")
	if err != nil {
		return nil, err
	}
	var out []Mapping
	for line := range bytes.Lines(maps) {
		// Most of many mappings are of no file.
		if bytes.IndexByte(line, '/') < 0 && !bytes.Contains(line, []byte(anonInode)) {
			continue
		}
		addresses, shared, file, ok := cutMapping(bytes.TrimSuffix(line, []byte("\n")))
		if !ok {
			continue
		}
		m, ok := r.file(file)
		if !ok {
			continue
		}
		m.Shared = shared
		if last := len(out) - 1; last >= 0 && !m.Shared && !out[last].Shared && m.Path == out[last].Path && m.Device == out[last].Device {
			continue
		}
		m.Addresses = MapFilesName(string(addresses))
		out = append(out, m)
	}
	return out, nil
}

// cutMapping cuts a line of /proc/PID/maps: addresses, permissions, offset, and
// what it says of the file.
func cutMapping(line []byte) (addresses []byte, shared bool, file []byte, ok bool) {
	addresses, line, _ = bytes.Cut(line, []byte(" "))
	permissions, line, _ := bytes.Cut(line, []byte(" "))
	_, file, ok = bytes.Cut(line, []byte(" "))
	return addresses, bytes.HasSuffix(permissions, []byte("s")), file, ok
}

// file reads what a line of /proc/PID/maps says of a file, if one is mapped:
// device, inode and path. No two lines of a file differ in it.
func (r *reader) file(line []byte) (Mapping, bool) {
	if m, ok := r.mapped[string(line)]; ok {
		return m, true
	}
	device, rest, _ := strings.Cut(string(line), " ")
	number, path, _ := strings.Cut(rest, " ")
	inode, err := strconv.ParseUint(number, 10, 64)
	path = strings.TrimLeft(path, " ")
	if err != nil || !strings.HasPrefix(path, "/") && !strings.HasPrefix(path, anonInode) {
		return Mapping{}, false
	}
	if len(r.mapped) == maxMapped {
		clear(r.mapped)
	}
	m := Mapping{Device: device, Path: path, Inode: inode}
	r.mapped[string(line)] = m
	return m, true
}

// MapFilesName is the name in map_files of the addresses in maps, which are
// padded with zeros.
func MapFilesName(addresses string) string {
	from, to, _ := strings.Cut(addresses, "-")
	trim := func(s string) string {
		if s = strings.TrimLeft(s, "0"); s == "" {
			return "0"
		}
		return s
	}
	return trim(from) + "-" + trim(to)
}

// Name returns the name of a process for messages. Processes choose their
// names.
func Name(pid int) string {
	return shown(procfs.FirstLine(fmt.Sprintf("/proc/%d/comm", pid)))
}
